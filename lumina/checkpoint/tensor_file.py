"""Writing one safetensors file tensor by tensor, hashed on the way: what is written never stands in memory whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
_CHUNK = 1 << 24  # bytes


class TensorFile:
    """A safetensors file that is being written; a context manager. Tensors come in the order in which they are listed.

    The SHA-256 is of the bytes that were meant, not of what a disk gave back.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata=None):
        """
        Args:
            path: overwritten.
            tensors: dtype and shape of each, by key.
            metadata: strings by key, for the file's header.

        Raises:
            OSError: where the file cannot be made.
        """
        self.path, self._tensors = path, dict(tensors)
        self._waiting = list(reversed(self._tensors))
        self._digest, self._bytes = hashlib.sha256(), 0
        self._hashed: Future | None = None
        self._file = path.open("wb", buffering=0)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for key, (dtype, shape) in self._tensors.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, key: str, values: Tensor) -> None:
        """The next tensor, of any device and dtype, flat or shaped; it is stored as it was listed.

        Raises:
            OSError: where the disk does not take it.
        """
        expected = self._waiting.pop()
        dtype, shape = self._tensors[key]
        assert key == expected, (key, expected)
        assert values.numel() == torch.Size(shape).numel(), (key, values.shape, shape)
        flat = values.detach().to("cpu", dtype).contiguous().view(-1)
        if flat.numel():
            self._put(memoryview(flat.view(torch.uint8).numpy()))

    def close(self) -> FileEntry:
        """Flush to the disk; what a manifest says of the file."""
        assert not self._waiting, f"{self.path} lacks {self._waiting[-1]}"
        self._settle()
        os.fsync(self._file.fileno())
        self._end()
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._settle()
            self._hashed = self._hasher.submit(self._digest.update, chunk)  # beside the write of the same bytes
            self._bytes += len(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
        # The caller may change the tensor once it is written.
        self._settle()

    def _settle(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None

    def _end(self) -> None:
        self._hasher.shutdown()
        self._file.close()
