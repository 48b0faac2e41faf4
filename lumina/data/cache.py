"""Blocks of remote shards on the local disk, shared by the processes of a node."""

import fcntl
import hashlib
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina.data.sources import Source

BLOCK_BYTES = 8 << 20
CHUNK_BYTES = 32 << 10
"""What is verified at once: a block is fetched whole, but a sample may be a hundredth of it."""
_DIGEST_BYTES = 16
_PAUSE_AFTER_FAILURE = 300.0
_ABANDONED_AFTER = 3600.0
_LOCK_SECONDS = 600.0
_POLL_SECONDS = (0.002, 0.05)


class Cache:
    """A size-bounded folder of verified blocks of remote sources.

    Any number of processes and threads may use one folder, each with a `Cache` of its own or one that was sent to it.
    A block that several ask for is fetched once. Every byte is checked against a hash before it is given; a damaged
    block is fetched again. The blocks that were used longest ago make room. The folder holds at most `max_bytes`, and
    one block more for each process that is just writing; what else lies in it is left alone. Where the disk does not
    take a block (full, read-only), reading goes on without the cache, with one warning.

    Args:
        folder: on a local disk; made if it is missing.
        max_bytes: bound of all blocks, in bytes.
        block_bytes: what is fetched at once; the same for all who share the folder.

    Raises:
        ValueError: the bound holds no block, or the folder cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        if block_bytes < 1 or max_bytes < _file_bytes(block_bytes):
            raise ValueError(
                f"a cache of {max_bytes} bytes cannot hold one block of {block_bytes} bytes; make it larger"
            )
        self.folder, self.max_bytes, self.block_bytes = Path(folder), max_bytes, block_bytes
        self._no_writing_until = 0.0
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the cache folder {folder} cannot be made ({error.strerror})") from error

    def read(self, source: Source, offset: int, size: int) -> bytes:
        """`size` bytes of `source` from byte `offset`; what is no remote source, or has no ranges, is read directly.

        Raises:
            ValueError: as `Source.read`.
        """
        if size == 0 or not (source.remote and source.ranged):
            return source.read(offset, size)
        whole = source.size()
        if offset < 0 or offset + size > whole:
            raise ValueError(f"{source} has {whole} bytes; bytes {offset} to {offset + size} do not lie in it")
        parts = []
        for number in range(offset // self.block_bytes, (offset + size - 1) // self.block_bytes + 1):
            first = number * self.block_bytes
            length = min(self.block_bytes, whole - first)
            start, stop = max(offset - first, 0), min(offset + size - first, length)
            parts.append(self._part(source, number, length, start, stop))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, source: Source, number: int, length: int, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of block `number`, which has `length`."""
        name = f"{source.location}\n{source.identity()}\n{self.block_bytes}\n{number}".encode(
            "utf-8", "surrogateescape"
        )
        key = hashlib.sha256(name).digest()
        path = self.folder / key[:1].hex() / f"{key[1:20].hex()}.block"
        found = _read_block(path, key, length, start, stop)
        if found is not None:
            return found
        if time.monotonic() < self._no_writing_until:
            return source.read(number * self.block_bytes + start, stop - start)
        try:
            path.parent.mkdir(exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                # Another process may have fetched it while this one waited.
                found = _read_block(path, key, length, start, stop)
                if found is not None:
                    return found
                self._remove(path)
                data = source.read(number * self.block_bytes, length)
                self._store(path, key, data)
                return data[start:stop]
        except OSError as error:
            self._go_on_without(error)
        return source.read(number * self.block_bytes + start, stop - start)

    def _store(self, path: Path, key: bytes, data: bytes) -> None:
        content = b"".join([*_digests(key, data), data])
        part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part")
        try:
            self._make_room(len(content))
            with part.open("xb") as stream:
                stream.write(content)
            part.replace(path)
        except OSError as error:
            # The bytes are here all the same; only the disk did not take them.
            self._go_on_without(error)
        finally:
            part.unlink(missing_ok=True)

    def _go_on_without(self, error: OSError) -> None:
        self._no_writing_until = time.monotonic() + _PAUSE_AFTER_FAILURE
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the cache {self.folder} takes no more blocks ({error.strerror or error}); reading goes on without it",
                stacklevel=2,
            )

    def _remove(self, path: Path) -> None:
        """Remove a damaged block."""
        with _locked(self.folder / "total.lock", keep=True):
            if path.exists():
                path.unlink(missing_ok=True)
                # What was booked for it is not known: damage may have changed its size.
                (self.folder / "total").unlink(missing_ok=True)

    def _make_room(self, count: int) -> None:
        """Book `count` bytes, after evicting what was used longest ago where they would not fit."""
        with _locked(self.folder / "total.lock", keep=True):
            total = self._total()
            if total + count > self.max_bytes:
                # Somewhat more than is needed, so that not every block costs a walk over all of them.
                total = self._evict(min(self.max_bytes - count, int(self.max_bytes * 0.95)))
                if total + count > self.max_bytes:
                    self._write_total(total)
                    raise OSError(0, f"{total} bytes of it cannot be removed")
            self._write_total(total + count)

    def _evict(self, target: int) -> int:
        """Remove blocks until at most `target` bytes are left; returns what is left."""
        blocks, total = [], 0
        for path, stat in self._files():
            if path.suffix == ".part" and time.time() - stat.st_mtime > _ABANDONED_AFTER:
                path.unlink(missing_ok=True)
                continue
            total += stat.st_size
            if path.suffix == ".block":
                blocks.append((stat.st_mtime_ns, path, stat.st_size))
        for _, path, size in sorted(blocks):
            if total <= target:
                break
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # not ours to remove; the next ones may be
            total -= size
        return total

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".block", ".part")):
                        try:
                            yield Path(entry.path), entry.stat()
                        except FileNotFoundError:
                            continue  # finished or removed by another process just now

    def _total(self) -> int:
        """Bytes of all blocks, as booked; counted anew where the book is missing or damaged."""
        try:
            total = int((self.folder / "total").read_text())
        except (FileNotFoundError, ValueError):
            total = -1
        return total if total >= 0 else sum(stat.st_size for _, stat in self._files())

    def _write_total(self, total: int) -> None:
        # In place, under the lock: what a kill leaves half written is counted anew.
        (self.folder / "total").write_text(str(total))


def _file_bytes(length: int) -> int:
    return length + _DIGEST_BYTES * -(-length // CHUNK_BYTES)


def _digests(key: bytes, data: bytes, first: int = 0) -> list[bytes]:
    """A hash for each chunk, bound to the block and the place in it."""
    view, digests = memoryview(data), []
    for number in range(-(-len(data) // CHUNK_BYTES)):
        digest = hashlib.sha256(b"%b%d:" % (key, first + number))
        digest.update(view[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES])
        digests.append(digest.digest()[:_DIGEST_BYTES])
    return digests


def _read_block(path: Path, key: bytes, length: int, start: int, stop: int) -> bytes | None:
    """Bytes of a block; None if it is not there or damaged where they lie."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != _file_bytes(length):
            return None
        first, last = start // CHUNK_BYTES, (stop - 1) // CHUNK_BYTES
        base = _file_bytes(length) - length
        digests = os.pread(descriptor, (last - first + 1) * _DIGEST_BYTES, first * _DIGEST_BYTES)
        end = min((last + 1) * CHUNK_BYTES, length)
        data = os.pread(descriptor, end - first * CHUNK_BYTES, base + first * CHUNK_BYTES)
        if b"".join(_digests(key, data, first)) != digests:
            return None
        _mark_used(descriptor)
    except OSError:
        return None  # a disk that fails to read is as good as a damaged block
    finally:
        os.close(descriptor)
    return data[start - first * CHUNK_BYTES : stop - first * CHUNK_BYTES]


def _mark_used(descriptor: int) -> None:
    try:
        os.utime(descriptor)
    except PermissionError:
        return  # another user's block keeps its place in the order of eviction


@contextmanager
def _locked(path: Path, keep: bool = False) -> Iterator[None]:
    """Hold the lock of a file among processes and threads; it goes with the process that holds it."""
    pause, longest = _POLL_SECONDS
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{path.name} has been locked for {_LOCK_SECONDS:.0f} s") from None
                    time.sleep(pause)
                    pause = min(2 * pause, longest)
            # The holder before may have removed the file: a lock on that one keeps nobody out.
            if keep or _is(path, descriptor):
                try:
                    yield
                finally:
                    if not keep:
                        path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
