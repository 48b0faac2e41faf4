"""What tensors hold, counted where torch makes them: of fake tensors as well as of real ones."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA_UNIT = 512
"""Bytes, of which torch's allocator for CUDA gives out multiples."""


class Block(NamedTuple):
    """One storage: its bytes as the allocator counts them, and the operation and tensor that it came to be with."""

    bytes: int
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class LiveBytes(TorchDispatchMode):
    """While the mode is on, counts storages on the CPU from the operation that makes them to their end; those made
    before count from when an operation returns them.

    live, peak: bytes, now and at most since `peak` was last set. What an operation takes and gives back within itself
    is not seen.
    """

    def __init__(self, unit: int = 1):
        """`unit`: bytes of which an allocator gives out multiples."""
        super().__init__()
        self._unit = unit
        self.blocks: dict[int, Block] = {}
        self.live, self.peak = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **kwargs or {})
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self._note(value, str(function))
        return result

    def _note(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.blocks:
            return
        size = -(-storage.nbytes() // self._unit) * self._unit
        self.blocks[key] = Block(size, operation, tuple(tensor.shape), tensor.dtype)
        self.live += size
        self.peak = max(self.peak, self.live)
        # The object stands for the storage as long as anything has it, also if that is autograd alone.
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self.blocks.pop(key).bytes
