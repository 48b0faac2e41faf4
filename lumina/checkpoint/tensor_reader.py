"""Reading foreign files tensor by tensor: what is not asked for is not in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumina.checkpoint.tensor_file import NAMES
from lumina.model.inert import load_inert

_DTYPES = {name: dtype for dtype, name in NAMES.items()}
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Pages of mapped files that may be in memory at once, in bytes.
_MAPPED = 1 << 28


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


class MappedPickles:
    """Files of `torch.save`, mapped into memory and let go again, so that few of their pages are in it at once."""

    def __init__(self):
        self._open: dict[Path, Any] = {}
        self._touched = 0

    def contents(self, path: Path) -> Any:
        """What a file holds. To be asked for anew for every tensor: whoever keeps it keeps the pages.

        Raises:
            ValueError: as `load_inert`.
        """
        if path not in self._open:
            self._open[path] = load_inert(path, mapped=True)
        return self._open[path]

    def touched(self, count: int) -> None:
        """So many bytes of some file were read."""
        self._touched += count
        if self._touched > _MAPPED:
            self._open.clear()
            self._touched = 0


class PickleReader:
    """A `.pth` file that maps names to tensors."""

    def __init__(self, path: Path, pickles: MappedPickles):
        """
        Raises:
            ValueError: for a file that is damaged, or holds something else.
        """
        self.path, self._pickles = path, pickles
        state = pickles.contents(path)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path}: is no state dict, which maps names to tensors")
        self.tensors = {key: stored_of(value, f"{path}: {key}") for key, value in state.items()}

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own."""
        tensor = self._pickles.contents(self.path)[key].detach().clone(memory_format=torch.contiguous_format)
        self._pickles.touched(tensor.nbytes)
        return tensor


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
