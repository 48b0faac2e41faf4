"""The residual connection of a modulated block and the norm that follows it, in one pass over the tokens."""

import torch
from torch import Tensor

from . import modulated_norm, triton_support
from .checks import expect_pack
from .dispatch import Operation
from .reference import gated_sum, modulated, modulated_backward, of_token, rms_normed, sum_of_samples, wide
from .registration import fused


def _check(
    x_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
) -> None:
    expect_pack(x_td, sample_id_t, {"y": y_td}, {"gate": gate_nd, "scale": scale_nd, "shift": shift_nd}, weight_d)


@Operation.checked(_check)
def gated_residual_norm(
    x_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``s = x + gate · y`` and ``RMSNorm(s) · (1 + scale) + shift``; fp32 inside, the norm of the rounded sum.

    Shapes: x, y (T, D) tokens; weight (D,); gate, scale, shift (N, D) samples; sample_id (T,) in [0, N), sorted.
    """
    sum_td = gated_sum(x_td, gate_nd, y_td, sample_id_t)
    return sum_td, modulated(rms_normed(sum_td, eps)[0], weight_d, scale_nd, shift_nd, sample_id_t, x_td.dtype)


def _forward_triton(
    x_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return modulated_norm.forward(
        x_td, weight_d, scale_nd, shift_nd, sample_id_t, eps, centred=False, residual=(gate_nd, y_td)
    )


@fused("gated_residual_norm", _forward_triton)
def _forward(
    x_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its modulated norm, and 1/rms of each token (1, T)."""
    sum_td = gated_sum(x_td, gate_nd, y_td, sample_id_t)
    normed, moments = rms_normed(sum_td, eps)
    return sum_td, modulated(normed, weight_d, scale_nd, shift_nd, sample_id_t, x_td.dtype), moments


def _backward_triton(
    grad_sum_td: Tensor,
    grad_td: Tensor,
    sum_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    residual = (grad_sum_td, gate_nd, y_td)
    grad_x, grad_weight, grad_scale, grad_shift, grad_gate, grad_y = modulated_norm.backward(
        grad_td, sum_td, weight_d, scale_nd, shift_dtype, sample_id_t, moments_mt, residual
    )
    return grad_x, grad_gate, grad_y, grad_weight, grad_scale, grad_shift


@fused("gated_residual_norm_backward", _backward_triton)
def _backward(
    grad_sum_td: Tensor,
    grad_td: Tensor,
    sum_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, y, weight, scale and shift."""
    back, *grads = modulated_backward(grad_td, sum_td, weight_d, scale_nd, sample_id_t, moments_mt, shift_dtype)
    back = back + wide(grad_sum_td)
    grad_gate = sum_of_samples(back * wide(y_td), sample_id_t, len(gate_nd)).to(gate_nd.dtype)
    grad_y = (back * of_token(wide(gate_nd), sample_id_t)).to(y_td.dtype)
    return back.to(sum_td.dtype), grad_gate, grad_y, *grads


def _save(ctx, inputs, output):
    _, gate, y, weight, scale, shift, sample_id, _ = inputs
    sum_td, _, moments = output
    ctx.save_for_backward(sum_td, gate, y, weight, scale, sample_id, moments)
    ctx.shift_dtype = shift.dtype


def _differentiate(ctx, grad_sum, grad_out, _):
    return *_backward(grad_sum, grad_out, *ctx.saved_tensors, ctx.shift_dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@gated_residual_norm.implementation("triton", usable=triton_support.usable)
def _fused(
    x_td: Tensor,
    gate_nd: Tensor,
    y_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _forward(x_td, gate_nd, y_td, weight_d, scale_nd, shift_nd, sample_id_t, eps)[:2]
