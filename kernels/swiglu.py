"""The gated activation of the feed-forward network."""

import torch
from torch import Tensor

from . import triton_support
from .dispatch import Operation
from .reference import wide
from .registration import fused
from .triton_support import block_of, jit, rows, tl

_COLUMNS = 2048


@jit
def swiglu_forward(
    a_ptr,
    b_ptr,
    out_ptr,
    blocks,
    a_stride,
    b_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    a = tl.load(a_ptr + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
    out = a / (1.0 + tl.exp(-a)) * b
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def swiglu_backward(
    grad_ptr,
    a_ptr,
    b_ptr,
    grad_a_ptr,
    grad_b_ptr,
    blocks,
    grad_stride,
    a_stride,
    b_stride,
    grad_a_stride,
    grad_b_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-a))
    grad_a = grad * b * gate * (1.0 + a * (1.0 - gate))
    grad_b = grad * a * gate
    tl.store(grad_a_ptr + row * grad_a_stride + columns, grad_a.to(grad_a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_b_ptr + row * grad_b_stride + columns, grad_b.to(grad_b_ptr.dtype.element_ty), mask=inside)


@Operation
def swiglu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """``silu(a) · b`` of two tensors of one shape, fp32 inside (Shazeer, arXiv 2002.05202).

    Without `b`, `a` (..., 2·F) holds both, side by side.

    Raises:
        ValueError: for tensors of two shapes, or one that cannot be halved.
    """
    return _product(*_both(a, b))


def _both(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    if b is None:
        if a.shape[-1] % 2:
            raise ValueError(f"swiglu of one tensor halves its last dim, which is {a.shape[-1]}")
        return a.chunk(2, -1)
    if a.shape != b.shape:
        raise ValueError(f"swiglu takes two tensors of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def _product(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return (torch.nn.functional.silu(wide(a)) * wide(b)).to(dtype).contiguous()


def _product_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide_a, gate = wide(a), wide(a).sigmoid()
    grad_a = wide(grad) * wide(b) * gate * (1 + wide_a * (1 - gate))
    return grad_a.to(a.dtype).contiguous(), (wide(grad) * wide_a * gate).to(b.dtype).contiguous()


def _launch_forward(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
    if out.numel():
        width = a.shape[-1]
        a, b = (rows(x.reshape(-1, width)) for x in (a, b))
        block = min(block_of(width), _COLUMNS)
        blocks = -(-width // block)
        triton_support.launch(
            swiglu_forward,
            (len(a) * blocks,),
            a,
            b,
            out,
            blocks,
            a.stride(0),
            b.stride(0),
            WIDTH=width,
            BLOCK=block,
            warps=max(1, block // 512),
        )
    return out


def _launch_backward(grad: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    """Fill `grad_a` and `grad_b`."""
    if grad.numel():
        width = a.shape[-1]
        grad, a, b = (rows(x.reshape(-1, width)) for x in (grad, a, b))
        grad_a, grad_b = grad_a.view(-1, width), grad_b.view(-1, width)
        block = min(block_of(width), _COLUMNS)
        blocks = -(-width // block)
        triton_support.launch(
            swiglu_backward,
            (len(a) * blocks,),
            grad,
            a,
            b,
            grad_a,
            grad_b,
            blocks,
            grad.stride(0),
            a.stride(0),
            b.stride(0),
            grad_a.stride(0),
            grad_b.stride(0),
            WIDTH=width,
            BLOCK=block,
            warps=max(1, block // 512),
        )


def _backward_triton(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    _launch_backward(grad, a, b, grad_a, grad_b)
    return grad_a, grad_b


def _packed_triton(ab: Tensor) -> Tensor:
    return _launch_forward(*ab.chunk(2, -1))


def _packed_backward_triton(grad: Tensor, ab: Tensor) -> Tensor:
    grad_ab = torch.empty(ab.shape, dtype=ab.dtype, device=ab.device)
    _launch_backward(grad, *ab.chunk(2, -1), *grad_ab.chunk(2, -1))
    return grad_ab


@fused("swiglu", _launch_forward)
def _forward(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


@fused("swiglu_backward", _backward_triton)
def _backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _product_backward(grad, a, b)


@fused("swiglu_packed", _packed_triton)
def _packed(ab: Tensor) -> Tensor:
    return _product(*ab.chunk(2, -1))


@fused("swiglu_packed_backward", _packed_backward_triton)
def _packed_backward(grad: Tensor, ab: Tensor) -> Tensor:
    return torch.cat(_product_backward(grad, *ab.chunk(2, -1)), -1)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_forward.register_autograd(lambda ctx, grad: _backward(grad, *ctx.saved_tensors), setup_context=_save)
_packed.register_autograd(lambda ctx, grad: _packed_backward(grad, *ctx.saved_tensors), setup_context=_save)


@swiglu.implementation("triton", usable=triton_support.usable_at_any_width)
def _fused(a: Tensor, b: Tensor | None = None) -> Tensor:
    _both(a, b)
    return _packed(a) if b is None else _forward(a, b)
