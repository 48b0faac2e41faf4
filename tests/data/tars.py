"""Tar files made by hand, and damaged."""

import io
import os
import tarfile
from pathlib import Path


def member_at(shard: Path, name: str) -> tuple[int, int]:
    """(offset of the header, offset of the content) in bytes."""
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    """Change bytes without a trace in size or time, as a failing disk does."""
    times = shard.stat()
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(shard: Path, offset: int) -> None:
    overwrite(shard, offset, bytes([shard.read_bytes()[offset] ^ 4]))


def close_tar(shard: Path, offset: int) -> None:
    """Cut at `offset` and end properly."""
    data = shard.read_bytes()[:offset] + bytes(1024)
    shard.write_bytes(data + bytes(-len(data) % 10240))


def tar_of(path: Path, members: list[tuple[str, bytes]], **info: object) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for field, value in info.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(data))
    return path
