"""Writing one `.pth` file tensor by tensor, as `torch.save` writes a state dict: it never stands in memory whole.

The format: a zip archive, nothing compressed, of `data.pkl` (the pickled dict, each tensor a call of torch's own
rebuilding function on a storage that is named by number) and `data/N`, the bytes of each storage, aligned for mapping.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lumina.checkpoint.manifest import FileEntry, sha256_of

_ALIGNMENT = 64
_CHUNK = 1 << 24
# Bytes of a member's header before its name, and of what zipfile adds for a large member.
_HEADER, _ZIP64 = 30, 20
_ROOT = "archive"
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


class TorchFile:
    """A `.pth` file that is being written; a context manager. Tensors come in the order in which they are listed."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        """
        Args:
            path: overwritten.
            tensors: dtype (fp32, bf16 or fp16) and shape of each, by key.

        Raises:
            OSError: where the file cannot be made.
        """
        self.path = path
        self._tensors = dict(tensors)
        self._waiting = list(enumerate(self._tensors))[::-1]
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._put("data.pkl", memoryview(_pickled(self._tensors)))
        self._put("byteorder", memoryview(sys.byteorder.encode()))

    def write(self, key: str, values: Tensor) -> None:
        """The next tensor, of any device and dtype, flat or shaped; it is stored as it was listed.

        Raises:
            OSError: where the disk does not take it.
        """
        number, expected = self._waiting.pop()
        dtype, shape = self._tensors[key]
        assert key == expected, (key, expected)
        assert values.numel() == prod(shape), (key, values.shape, shape)
        flat = values.detach().to("cpu", dtype).contiguous().view(-1)
        data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
        self._put(f"data/{number}", data)

    def close(self) -> FileEntry:
        """Flush to the disk; what a manifest says of the file. The zip's headers are written last: it is read again."""
        assert not self._waiting, f"{self.path} lacks {self._waiting[-1][1]}"
        self._put("version", memoryview(b"3\n"))
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(bytes=self.path.stat().st_size, sha256=sha256_of(self.path))

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Without the archive's directory, if it was not closed: a file that nobody can take for a whole one.
        self._zip.fp = None  # or zipfile would write it when it goes
        self._file.close()

    def _put(self, name: str, data: memoryview) -> None:
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
        entry.file_size = len(data)
        header = _HEADER + len(entry.filename) + (_ZIP64 if _needs_zip64(entry) else 0)
        padding = -(self._file.tell() + header) % _ALIGNMENT
        if padding:
            padding += _ALIGNMENT if padding < 4 else 0
            entry.extra = struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
        with self._zip.open(entry, "w") as member:
            for start in range(0, len(data), _CHUNK):
                member.write(data[start : start + _CHUNK])


def _needs_zip64(entry: zipfile.ZipInfo) -> bool:
    """As zipfile decides it, when it opens a member of known size."""
    return entry.file_size * 1.05 > zipfile.ZIP64_LIMIT


class _Storage:
    """Named in the pickle by what `persistent_id` says of it."""

    def __init__(self, dtype: torch.dtype, number: int, numel: int):
        self.name = ("storage", _STORAGES[dtype], str(number), "cpu", numel)


class _Rebuilt:
    """A contiguous tensor, pickled as torch pickles one."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, tuple]:
        stride = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> tuple | None:
        return item.name if isinstance(item, _Storage) else None


def _pickled(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    out: BinaryIO = io.BytesIO()
    state = {
        key: _Rebuilt(_Storage(dtype, number, prod(shape)), tuple(shape))
        for number, (key, (dtype, shape)) in enumerate(tensors.items())
    }
    _Pickler(out, protocol=2).dump(state)
    return out.getvalue()
