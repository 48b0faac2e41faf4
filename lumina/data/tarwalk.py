"""Walking a tar shard header by header, stopping at damage instead of stepping over it."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lumina.data.sources import Source

BLOCK = 512
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAME, _PAX = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE


@dataclass(frozen=True)
class Member:
    """One regular file of a tar: `offset` and the length of `data` in bytes, `crc` its CRC32."""

    name: str
    offset: int
    data: bytes
    crc: int


class TarWalk:
    """Iterates over the regular files of a tar, in one sequential pass; afterwards `sha256` and `size` are the file's.

    Python's tarfile and webdataset take a zero hole or a damaged header for the end of the archive and say nothing.
    Here every header's checksum must hold, every payload be whole, and the end be marked and followed by zeros only.

    Raises:
        ValueError: damage, with the shard, the byte and the last member that was whole; or it cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.size = 0
        self._digest = hashlib.sha256()
        self._last = "no member yet"

    @property
    def sha256(self) -> str:
        """Hex digest of the file read so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        with self.source.stream() as stream:
            overrides: dict[str, str] = {}
            while True:
                info, at = self._header(stream)
                if info is None:
                    self._only_zeros_follow(stream, at)
                    return
                if info.type in (_LONG_NAME, _PAX):
                    overrides |= self._extension(info, self._payload(stream, info.size, at), at)
                    continue
                name, size = overrides.pop("path", info.name), int(overrides.pop("size", info.size))
                overrides.clear()
                if info.type in _REGULAR:
                    offset = self.size
                    data = self._payload(stream, size, at, name)
                    self._last = name
                    yield Member(name, offset, data, zlib.crc32(data))
                elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
                    raise self._damage(at, f"member {name} is a link or a device; a shard holds regular files only")
                else:
                    self._payload(stream, size, at)

    def _read(self, stream: io.BufferedReader, count: int) -> bytes:
        data = stream.read(count)
        self._digest.update(data)
        self.size += len(data)
        return data

    def _header(self, stream: io.BufferedReader) -> tuple[tarfile.TarInfo | None, int]:
        at = self.size
        block = self._read(stream, BLOCK)
        if len(block) < BLOCK:
            raise self._damage(at, "the shard is truncated: it ends without the end mark of a tar")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), at
        except tarfile.EOFHeaderError:
            return None, at
        except tarfile.HeaderError as error:
            raise self._damage(at, f"the header is damaged ({error})") from error

    def _payload(self, stream: io.BufferedReader, size: int, at: int, name: str = "") -> bytes:
        padded = -(-size // BLOCK) * BLOCK
        data = self._read(stream, padded)
        if len(data) < padded:
            raise self._damage(at, f"the shard is truncated inside {name or 'a header extension'}")
        return data[:size]

    def _extension(self, info: tarfile.TarInfo, data: bytes, at: int) -> dict[str, str]:
        if info.type == _LONG_NAME:
            return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        records = {}
        while data:
            length, space, _ = data.partition(b" ")
            if not space or not length.isdigit() or not 0 < int(length) <= len(data):
                raise self._damage(at, "a pax header extension is damaged")
            record, data = data[len(length) + 1 : int(length)], data[int(length) :]
            key, _, value = record.rstrip(b"\n").partition(b"=")
            records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        if not records.get("size", "0").isdigit():
            raise self._damage(at, "a pax header extension is damaged")
        return {key: records[key] for key in ("path", "size") if key in records}

    def _only_zeros_follow(self, stream: io.BufferedReader, at: int) -> None:
        if len(tail := self._read(stream, BLOCK)) < BLOCK:
            raise self._damage(at, "the shard is truncated: it ends inside the end mark of a tar")
        while tail:
            if tail.strip(b"\0"):
                raise self._damage(at, f"a hole of zeros lies before more data near byte {self.size - len(tail)}")
            tail = self._read(stream, 1 << 20)
        if self.size - at >= 2 * BLOCK + tarfile.RECORDSIZE:
            raise self._damage(at, f"only zeros follow, {self.size - at} bytes of them: the rest of the shard was lost")

    def _damage(self, at: int, what: str) -> ValueError:
        return ValueError(f"shard {self.source} is damaged at byte {at}, after {self._last}: {what}")
