"""Registering a fused operation with torch: its reference on the CPU, its Triton kernel on CUDA."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef
from torch.utils._pytree import tree_map_only

from .triton_support import triton

FUSED: dict[str, CustomOpDef] = {}
"""Every custom op of ours by its name, which is ``lumina::name`` to torch."""

TRITON: dict[str, Callable] = {}
"""What each runs on CUDA."""


def fused(
    name: str, triton_implementation: Callable, mutates: tuple[str, ...] = ()
) -> Callable[[Callable], CustomOpDef]:
    """Register the decorated torch reference and `triton_implementation`, of one signature, as ``lumina::name``.

    The reference also says what comes out when a graph is traced. So it must not look at values, and what it returns
    must be none of what it was given. Results are contiguous, as the kernels' are.
    """

    def register(function: Callable) -> CustomOpDef:
        @functools.wraps(function)
        def reference(*args: Any) -> Any:
            return tree_map_only(torch.Tensor, torch.Tensor.contiguous, function(*args))

        op = torch.library.custom_op(f"lumina::{name}", reference, mutates_args=mutates, device_types="cpu")
        op.register_fake(reference)
        if triton is not None:
            op.register_kernel("cuda")(triton_implementation)
        FUSED[name], TRITON[name] = op, triton_implementation
        return op

    return register
