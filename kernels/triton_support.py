"""What all Triton kernels share: compiling and launching them, and running without Triton where there is none."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import on_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux
    triton = None

    class tl:
        """As much of the language as the signatures of kernels name."""

        constexpr = int


WIDEST = 8192
"""The most elements of a row that one program holds; with more, registers spill."""
MOST_STAGES = 3
"""Tokens whose rows are on their way while one is worked on, and that one."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Callable) -> Any:
    """``triton.jit``, where there is Triton."""
    # Runtime type checks wrap functions, and Triton looks names up where the function it is given was defined.
    return function if triton is None else triton.jit(inspect.unwrap(function))


def usable(x: Tensor) -> bool:
    """Whether kernels that hold a row in one program run on tensors such as this."""
    return usable_at_any_width(x) and x.shape[-1] <= WIDEST


def usable_at_any_width(x: Tensor) -> bool:
    """Whether the other kernels run on tensors such as this."""
    return on_gpu(x) and triton is not None and x.dtype in _DTYPES


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float | None, warps: int, **constants: Any
) -> None:
    """Run `kernel` on the device of its first argument. Every launch passes here, so that tests can look on."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=warps, **constants)


def stages(x: Tensor, row_bytes: int) -> int:
    """How many tokens are under way at once where a token's rows have `row_bytes`: as many as shared memory holds."""
    return max(1, min(MOST_STAGES, 1 + (shared_memory(x.device) - 1024) // row_bytes))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have; of another device than CUDA's, those of an A100."""
    if device.type != "cuda":
        return 163 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_at_once(x: Tensor, programs_each: int) -> int:
    """How many programs fill the device of `x` when a multiprocessor holds `programs_each`."""
    return programs_each * (_multiprocessors(x.device) if x.is_cuda else 132)


def block_of(width: int) -> int:
    """The power of two that holds `width`."""
    return 1 << max(width - 1, 0).bit_length()


def rows(x: Tensor) -> Tensor:
    """`x` with its last dim contiguous, as kernels read it; the others may be strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@jit
def first_row_from(sample_id_ptr, low, high, sample, SEARCH: tl.constexpr):
    """First of the rows [low, high), sorted by sample, that belongs to `sample` or a later one; `high` if none."""
    while low < high:
        step = tl.cdiv(high - low, SEARCH)
        lasts = low + (tl.arange(0, SEARCH) + 1) * step - 1  # of SEARCH stretches
        ids = tl.load(sample_id_ptr + lasts, mask=lasts < high, other=2147483647)
        low += tl.sum((ids < sample).to(tl.int64)) * step
        high = tl.minimum(high, low + step - 1)
    return low
