"""Reading foreign files tensor by tensor: what is not asked for is not in memory."""

import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumina.checkpoint.tensor_file import NAMES
from lumina.model.inert import load_inert

_DTYPES = {name: dtype for dtype, name in NAMES.items()}
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Stored(NamedTuple):
    """What a tensor is, where it is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsReader:
    """A safetensors file; opened for each tensor, for its pages stay in memory as long as it is open."""

    def __init__(self, path: Path):
        """
        Raises:
            ValueError: for a damaged file.
        """
        self.path = path
        self.tensors: dict[str, Stored] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    held = file.get_slice(key)
                    self.tensors[key] = Stored(_DTYPES.get(held.get_dtype()), tuple(held.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
        for key, stored in self.tensors.items():
            check_float(stored.dtype, f"{path}: {key}")

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key).clone()


class PickleFiles:
    """Files of `torch.save`, whose tensors are read one at a time.

    A mapping of a whole file, torch's own way, counts as memory that may be written to: a file larger than the memory
    of the machine cannot be mapped, and what was read stays. Here the file is read where a tensor's values are.
    """

    def __init__(self):
        self._contents: dict[Path, Any] = {}
        self._members: dict[Path, dict[int, int]] = {}

    def contents(self, path: Path) -> Any:
        """What a file holds; its tensors have values when they are `read`, and mostly are on "meta" before.

        Raises:
            ValueError: as `load_inert`.
        """
        if path not in self._contents:
            # A file from before torch 1.6 is no archive, and is read whole.
            archive = zipfile.is_zipfile(path)
            self._contents[path] = load_inert(path, skeleton=archive)
            self._members[path] = _members(path) if archive else {}
        return self._contents[path]

    def read(self, path: Path, tensor: Tensor) -> Tensor:
        """The values of a tensor of a file's contents, or of a slice of one, in memory of their own.

        Raises:
            ValueError: for a damaged file.
        """
        if tensor.device.type != "meta":
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        start = tensor.untyped_storage()._checkpoint_offset
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first = tensor.storage_offset() * tensor.element_size()
        values = torch.empty(span, dtype=tensor.dtype)
        data = memoryview(values.view(torch.uint8).numpy())
        if start is None or first + len(data) > self._members[path].get(start, 0):
            raise ValueError(f"{path}: damaged, a tensor of it is not where the file says")
        with path.open("rb", buffering=0) as file:
            file.seek(start + first)
            while data:
                count = file.readinto(data)
                if not count:
                    raise ValueError(f"{path}: damaged, it ends within a tensor")
                data = data[count:]
        return values.as_strided(tensor.shape, tensor.stride()).contiguous()


def _members(path: Path) -> dict[int, int]:
    """Sizes of the members of an archive, by where their bytes start."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            if member.compress_type == zipfile.ZIP_STORED:
                found[member.header_offset + 30 + name + extra] = member.file_size
    return found


class PickleReader:
    """A `.pth` file that maps names to tensors."""

    def __init__(self, path: Path, files: PickleFiles):
        """
        Raises:
            ValueError: for a file that is damaged, or holds something else.
        """
        self.path, self._files = path, files
        state = files.contents(path)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path}: is no state dict, which maps names to tensors")
        self.tensors = {key: stored_of(value, f"{path}: {key}") for key, value in state.items()}

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self._files.read(self.path, self._files.contents(self.path)[key])


TensorReader = SafetensorsReader | PickleReader


def stored_of(tensor: Any, where: str) -> Stored:
    """
    Raises:
        ValueError: for what is no plain tensor of floats; `where` names it.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{where} is no plain tensor")
    check_float(tensor.dtype, where)
    return Stored(tensor.dtype, tuple(tensor.shape))


def check_float(dtype: torch.dtype | None, where: str) -> None:
    """
    Raises:
        ValueError: for another dtype than weights have.
    """
    if dtype not in FLOATS:
        named = "of another dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} is {named}; weights are float32, bfloat16 or float16")
