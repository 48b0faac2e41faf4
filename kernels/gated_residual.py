"""The residual connection of a modulated block."""

import torch
from torch import Tensor

from . import triton_support
from .checks import expect_pack
from .dispatch import Operation
from .modulated_norm import launch_sum, partial_sums
from .reference import gated_sum, of_token, sum_of_samples, wide
from .registration import fused
from .triton_support import block_of, first_row_from, jit, rows, tl

_CHUNK, _COLUMNS = 8, 2048


@jit
def gated_residual_forward(
    x_ptr,
    gate_ptr,
    y_ptr,
    sample_id_ptr,
    out_ptr,
    tokens,
    chunk,
    x_stride,
    gate_stride,
    y_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(row + chunk, tokens)
    while row < stop:
        sample = tl.load(sample_id_ptr + row).to(tl.int64)
        end = first_row_from(sample_id_ptr, row, stop, sample + 1, 32)
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        for token in tl.range(row, end):
            x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + token * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
            out = (x + gate * y).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + token * WIDTH + columns, out, mask=inside)
        row = end


@jit
def gated_residual_backward(
    grad_ptr,
    gate_ptr,
    y_ptr,
    sample_id_ptr,
    grad_y_ptr,
    partial_ptr,
    tokens,
    chunk,
    grad_stride,
    gate_stride,
    y_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    program = tl.program_id(0).to(tl.int64)
    row = program * chunk
    stop = tl.minimum(row + chunk, tokens)
    while row < stop:
        sample = tl.load(sample_id_ptr + row).to(tl.int64)
        end = first_row_from(sample_id_ptr, row, stop, sample + 1, 128)
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        of_gate = tl.zeros((BLOCK,), tl.float32)
        for token in tl.range(row, end, num_stages=STAGES):
            grad = tl.load(grad_ptr + token * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + token * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
            of_gate += grad * y
            grad_y = (gate * grad).to(grad_y_ptr.dtype.element_ty)
            tl.store(grad_y_ptr + token * WIDTH + columns, grad_y, mask=inside)
        tl.store(partial_ptr + (program + sample) * WIDTH + columns, of_gate, mask=inside)
        row = end


def _check(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> None:
    expect_pack(x_td, sample_id_t, {"y": y_td}, {"gate": gate_nd})


@Operation.checked(_check)
def gated_residual(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    """``x + gate · y``, gate of the sample each token belongs to; fp32 inside.

    Shapes: x, y (T, D) tokens; gate (N, D) samples; sample_id (T,) in [0, N), sorted.
    """
    return gated_sum(x_td, gate_nd, y_td, sample_id_t)


def _forward_triton(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    tokens, width = x_td.shape
    x, gate, y = rows(x_td), rows(gate_nd), rows(y_td)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        block = min(block_of(width), _COLUMNS)
        triton_support.launch(
            gated_residual_forward,
            (-(-tokens // _CHUNK), -(-width // block)),
            x,
            gate,
            y,
            sample_id_t.contiguous(),
            out,
            tokens,
            _CHUNK,
            x.stride(0),
            gate.stride(0),
            y.stride(0),
            WIDTH=width,
            BLOCK=block,
            warps=max(1, block // 512),
        )
    return out


@fused("gated_residual", _forward_triton)
def _forward(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    return gated_sum(x_td, gate_nd, y_td, sample_id_t)


def _backward_triton(grad_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = y_td.shape
    grad, gate, y, sample_id = rows(grad_td), rows(gate_nd), rows(y_td), sample_id_t.contiguous()
    grad_y = torch.empty_like(y, memory_format=torch.contiguous_format)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    chunk, partial = partial_sums(y, len(gate), 1, 2)
    if grad_y.numel():
        block = min(block_of(width), _COLUMNS)
        triton_support.launch(
            gated_residual_backward,
            (-(-tokens // chunk), -(-width // block)),
            grad,
            gate,
            y,
            sample_id,
            grad_y,
            partial,
            tokens,
            chunk,
            grad.stride(0),
            gate.stride(0),
            y.stride(0),
            WIDTH=width,
            BLOCK=block,
            STAGES=triton_support.stages(grad, block * (grad.element_size() + y.element_size())),
            warps=max(1, block // 512),
        )
    launch_sum(partial, sample_id, chunk, None, None, (None, None, grad_gate, None))
    return grad_gate, grad_y


@fused("gated_residual_backward", _backward_triton)
def _backward(grad_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and y; that of x is the one that came."""
    grad = wide(grad_td)
    grad_gate = sum_of_samples(grad * wide(y_td), sample_id_t, len(gate_nd))
    return grad_gate.to(gate_nd.dtype), (grad * of_token(wide(gate_nd), sample_id_t)).to(y_td.dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, grad):
    return grad, *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)


@gated_residual.implementation("triton", usable=triton_support.usable)
def _fused(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    return _forward(x_td, gate_nd, y_td, sample_id_t)
