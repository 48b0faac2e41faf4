"""One safetensors file, written tensor by tensor and hashed on the way, and read so: never in memory whole."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lumina.checkpoint.manifest import FileEntry

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_CHUNK, _BLOCK = 1 << 24, 1 << 12  # bytes: of a read or write, and what a disk takes as a whole


class _DirectFile:
    """A file written from front to back past the page cache, where there is such a way, while more is handed over.

    The cache would cost a copy and a fresh page for each one written, of data that nobody reads soon.
    """

    def __init__(self, path: Path, size: int):
        """`size`: bytes that will be written."""
        self._direct = getattr(os, "O_DIRECT", 0)  # unknown to some systems
        try:
            self._file = self._open(path)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system knows no direct writing
                raise
            self._direct = 0
            self._file = self._open(path)
        self._blank = [mmap.mmap(-1, max(_BLOCK, min(_CHUNK, size))) for _ in range(2)]  # at page boundaries
        self._filling, self._filled = self._blank.pop(), 0
        self._written = 0
        self._writing: tuple[mmap.mmap, Future[None]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")

    def _open(self, path: Path) -> FileIO:
        return open(path, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags | self._direct, 0o666))

    def write(self, data: memoryview) -> None:
        while data:
            count = min(len(data), len(self._filling) - self._filled)
            self._filling[self._filled : self._filled + count] = data[:count]
            self._filled, data = self._filled + count, data[count:]
            if self._filled == len(self._filling):
                self._settle()
                self._writing = self._filling, self._pool.submit(self._put, self._filling, self._filled)
                self._filling, self._filled = self._blank.pop(), 0

    def flush(self) -> None:
        """Write what is left, and wait until the disk has all."""
        self._settle()
        self._put(self._filling, self._filled)
        self._filled = 0
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()

    def _settle(self) -> None:
        if self._writing is not None:
            buffer, writing = self._writing
            writing.result()  # raises what went wrong
            self._blank.append(buffer)
            self._writing = None

    def _put(self, buffer: mmap.mmap, size: int) -> None:
        done = 0
        with memoryview(buffer) as data:
            while done < size:
                if self._direct and (size - done) % _BLOCK:
                    self._through_cache()  # the end of the file is no whole block
                try:
                    done += os.pwrite(self._file.fileno(), data[done:size], self._written + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._through_cache()  # larger blocks than ours are asked for
        self._written += size

    def _through_cache(self) -> None:
        fd = self._file.fileno()
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~self._direct)
        self._direct = 0


class TensorFile:
    """A safetensors file that is being written; a context manager. Tensors come in the order in which they are listed.

    Hashes are of the bytes that were meant, not of what a disk gave back. Hashing and writing go on beside each other,
    so a tensor must stay as it is until the file is closed; few wait at a time.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        hash_tensors: bool = False,
    ):
        """
        Args:
            path: overwritten.
            tensors: dtype and shape of each, by key.
            metadata: for the file's header.
            hash_tensors: hash the header and each tensor by itself, in place of the whole file.

        Raises:
            OSError: where the file cannot be made.
        """
        self.path, self._tensors = path, dict(tensors)
        self._waiting = list(reversed(self._tensors))
        self._digests = {key: hashlib.sha256() for key in self._tensors} if hash_tensors else {}
        self._digest = hashlib.sha256()
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for key, (dtype, shape) in self._tensors.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
        self._bytes = 8 + len(text) + offset
        self._file = _DirectFile(path, self._bytes)
        # One digest takes its bytes in order.
        self._hashers = min(4, os.cpu_count() or 1) if hash_tensors else 1
        self._hash_pool = ThreadPoolExecutor(self._hashers, thread_name_prefix="sha256")
        self._hashing: deque[Future[None]] = deque()
        self._put(memoryview(len(text).to_bytes(8, "little") + text), self._digest)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each tensor's bytes, once the file is closed; of none unless `hash_tensors`."""
        return {key: digest.hexdigest() for key, digest in self._digests.items()}

    def write(self, key: str, values: Tensor) -> None:
        """The next tensor, of any device and dtype, flat or shaped; it is stored as it was listed.

        Raises:
            OSError: where the disk does not take it.
        """
        expected = self._waiting.pop()
        dtype, shape = self._tensors[key]
        assert key == expected, (key, expected)
        assert values.numel() == torch.Size(shape).numel(), (key, values.shape, shape)
        flat = values.detach().to("cpu", dtype).contiguous()
        if flat.numel():
            flat = flat.as_strided((flat.numel(),), (1,))  # one element is contiguous whatever its stride says
            self._put(_bytes_of(flat), self._digests.get(key, self._digest))

    def close(self) -> FileEntry:
        """Flush to the disk; what a manifest says of the file."""
        assert not self._waiting, f"{self.path} lacks {self._waiting[-1]}"
        self._file.flush()
        while self._hashing:
            self._hashing.popleft().result()
        self._end()
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _put(self, data: memoryview, digest: "hashlib._Hash") -> None:
        if len(self._hashing) >= self._hashers:
            self._hashing.popleft().result()
        self._hashing.append(self._hash_pool.submit(digest.update, data))
        self._file.write(data)

    def _end(self) -> None:
        self._hash_pool.shutdown()
        self._file.close()


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())


def _after(pool: ThreadPoolExecutor, digest: "hashlib._Hash") -> str:
    pool.shutdown()
    return digest.hexdigest()


class StoredTensors:
    """A safetensors file that is being read, tensor by tensor, each into memory of its own."""

    def __init__(self, path: Path):
        """
        Raises:
            ValueError: for a file that is no whole safetensors file.
            OSError: where it cannot be opened.
        """
        self._file = path.open("rb", buffering=0)
        size = path.stat().st_size
        try:
            length = int.from_bytes(self._file.read(8), "little")
            if size < 8 + length:
                raise ValueError("it ends before its header does")
            self._start = 8 + length
            self.header = os.pread(self._file.fileno(), self._start, 0)
            """All before the tensors."""
            header = json.loads(self.header[8:])
            header.pop("__metadata__", None)
            self._places = {key: (_DTYPES[of["dtype"]], *of["data_offsets"]) for key, of in header.items()}
            if any(not 0 <= start <= end <= size - self._start for _, start, end in self._places.values()):
                raise ValueError("it ends before its tensors do")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its header does not read as safetensors ({error})") from error

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> tuple[Tensor, str]:
        """A tensor's elements, flat, in fp32, and the SHA-256 of its bytes as they are stored."""
        dtype, start, end = self._places[key]
        values = torch.empty((end - start) // dtype.itemsize)
        digest, done = hashlib.sha256(), 0
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:  # beside the reading
            if dtype == values.dtype:
                for part in self._chunks(start, _bytes_of(values)):
                    pool.submit(digest.update, part)
                return values, _after(pool, digest)
            # By way of memory that stays in the processor's cache; two, for one is being hashed.
            buffers = [torch.empty(min(_CHUNK, end - start) // dtype.itemsize, dtype=dtype) for _ in range(2)]
            hashing: Future[None] | None = None
            for number, first in enumerate(range(0, end - start, _CHUNK)):
                stored = buffers[number % 2][: (end - start - first) // dtype.itemsize]
                for _ in self._chunks(start + first, _bytes_of(stored)):
                    pass
                if hashing is not None:
                    hashing.result()
                hashing = pool.submit(digest.update, _bytes_of(stored))
                values[done : done + stored.numel()] = stored
                done += stored.numel()
            return values, _after(pool, digest)

    def sha256(self, key: str) -> str:
        """Of a tensor's bytes, of which few are in memory at a time."""
        _, start, end = self._places[key]
        digest, chunk = hashlib.sha256(), bytearray(min(_CHUNK, end - start))
        for first in range(start, end, _CHUNK):
            for part in self._chunks(first, memoryview(chunk)[: min(_CHUNK, end - first)]):
                digest.update(part)
        return digest.hexdigest()

    def _chunks(self, start: int, target: memoryview) -> Iterator[memoryview]:
        """Fill `target` from byte `start` of the tensors on; each stretch as it is filled. Threads may share."""
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done : done + _CHUNK]], self._start + start + done)
            if not count:
                raise ValueError(f"{self._file.name} is damaged: it became shorter while it was read")
            yield target[done : done + count]
            done += count
