"""Writing shards: webdataset tars with their indexes, complete or not at all."""

import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from lumina.data.indexing import build_index
from lumina.data.tarwalk import BLOCK


def write_shards(
    out_dir: str | Path, samples: Iterable[Mapping[str, Any]], *, name: str, samples_per_shard: int
) -> list[Path]:
    """Write samples into `out_dir/NAME-000000.tar`, … with the index of each beside it.

    The folder appears when all is written, and not at all after a failure. Equal samples give equal bytes.

    Args:
        out_dir: folder, new or empty.
        samples: each {"__key__": key, extension: content}; content is bytes, text (written as UTF-8) or, for JSON
            members, a dict. A key may hold folders and has no dot in its last part.
        name: first part of the file names.
        samples_per_shard: samples of each shard but the last.

    Returns:
        The shards, in order.

    Raises:
        ValueError: the folder is not empty or cannot be written, there are no samples, or a sample has a bad key or
            content, a key that its shard holds already, or no medium.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"{name!r} cannot start a file name; use letters, digits, '.', '_' and '-'")
    with complete_folder(out_dir) as work:
        shards = _write_all(work, iter(samples), name, samples_per_shard)
        if not shards:
            raise ValueError(f"there are no samples to write to {Path(out_dir).resolve()}")
    return [Path(out_dir).resolve() / shard for shard in shards]


@contextmanager
def complete_folder(out_dir: str | Path) -> Iterator[Path]:
    """A hidden folder beside `out_dir` that becomes it at the end of the block, or is deleted after a failure.

    Raises:
        ValueError: `out_dir` is not empty, or the block or the system cannot write (`OSError` in the block).
    """
    out_dir = Path(out_dir).resolve()
    try:
        if out_dir.exists() and any(out_dir.iterdir()):
            raise ValueError(f"folder {out_dir} is not empty; shards are written into a new or empty folder")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is one rename on one file system.
        work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.writing-", dir=out_dir.parent))
    except OSError as error:
        raise ValueError(f"shards cannot be written to {out_dir} ({error.strerror})") from error
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        sync_folder(work)
        work.rename(out_dir)
        sync_folder(out_dir.parent)
    except OSError as error:
        raise ValueError(f"shards cannot be written to {out_dir} ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shard(shard: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write one shard and the index beside it; both are on the disk when this returns.

    Args:
        shard: the tar file, replaced if it is there. After a failure a part of it may be left.
        samples: as in `write_shards`.

    Raises:
        ValueError: a sample cannot be written or indexed, as in `write_shards`.
        OSError: the file cannot be written.
    """
    # A new file: a process that was killed a moment ago may still be writing into the old one.
    shard.unlink(missing_ok=True)
    with shard.open("wb") as stream:
        # Fixed time and owner: the same samples give the same shard, so the same identity of the data set.
        with TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(_encoded(sample))
        stream.flush()
        os.fsync(stream.fileno())
    build_index(shard)
    return shard


def sample_bytes(key: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a sample in a shard that `write_shard` writes, given those of each member's content by extension."""
    return sum(_header_bytes(f"{key}.{name}", size) + -(-size // BLOCK) * BLOCK for name, size in sizes.items())


def _header_bytes(name: str, size: int) -> int:
    if name.isascii() and len(name) <= tarfile.LENGTH_NAME and size < 8**11:
        return BLOCK
    info = tarfile.TarInfo(name)
    info.size = size
    return len(info.tobuf(tarfile.PAX_FORMAT))


def shard_bytes(sample_bytes: int) -> int:
    """Size of a shard that `write_shard` writes, given the sum of its samples' `sample_bytes`."""
    return -(-(sample_bytes + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def cut_into_shards(sizes: np.ndarray, shard_size: int, samples_per_shard: int | None) -> np.ndarray:
    """Where the shards begin when samples are written one after another and each shard is filled as far as allowed.

    Args:
        sizes: int64 (samples,), `sample_bytes` of each.
        shard_size: bytes that no tar file exceeds; a sample that does so alone has a shard to itself.
        samples_per_shard: at most so many; None for no limit.

    Returns:
        int64 (shards + 1,): number of the first sample of each shard, and the number of samples.

    Raises:
        ValueError: a limit is too small.
    """
    if shard_size < tarfile.RECORDSIZE:
        raise ValueError(f"a shard takes at least {tarfile.RECORDSIZE} bytes; {shard_size} are too few")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
    room = shard_size // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = [0]
    while starts[-1] < len(sizes):
        first = starts[-1]
        before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + room, side="right")))
        starts.append(stop if samples_per_shard is None else min(stop, first + samples_per_shard))
    return np.array(starts, dtype=np.int64)


def _write_all(folder: Path, samples: Any, name: str, samples_per_shard: int) -> list[str]:
    shards = []
    for first in samples:
        shard = folder / f"{name}-{len(shards):06d}.tar"
        write_shard(shard, itertools.chain([first], itertools.islice(samples, samples_per_shard - 1)))
        shards.append(shard.name)
    return shards


def _encoded(sample: Mapping[str, Any]) -> dict[str, Any]:
    key = sample.get("__key__")
    if not isinstance(key, str) or not re.fullmatch(r"(?:[^/\0]+/)*[^/.\0]+", key):
        raise ValueError(f'"__key__" of a sample must be text without a dot in its last part, not {key!r}')
    encoded: dict[str, Any] = {"__key__": key}
    for extension, content in sample.items():
        if extension == "__key__":
            continue
        if extension != extension.lower() or not re.fullmatch(r"[^_./][^/]*", extension):
            raise ValueError(f"sample {key} has the extension {extension!r}; use lower case, such as 'png' or 'txt'")
        if isinstance(content, dict):
            content = json.dumps(content, sort_keys=True, ensure_ascii=False)
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes):
            raise ValueError(
                f".{extension} of sample {key} must be bytes, text or a dict, not {type(content).__name__}"
            )
        encoded[extension] = content
    return encoded


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk; `OSError` if that fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
