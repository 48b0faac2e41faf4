"""LayerNorm without affine parameters, modulated per sample: Flag-DiT's last norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modulated_norm, triton_support
from .checks import expect_pack
from .dispatch import Operation
from .reference import layer_normed, modulated, modulated_backward, wide
from .registration import fused


def _check(x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float) -> None:
    expect_pack(x_td, sample_id_t, {}, {"scale": scale_nd, "shift": shift_nd})


@Operation.checked(_check)
def layer_norm_modulate(x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) · (1 + scale) + shift``, scale and shift of the sample each token belongs to; fp32 inside.

    Shapes: x (T, D) tokens; scale, shift (N, D) samples; sample_id (T,) in [0, N), sorted.
    """
    normed_td = F.layer_norm(wide(x_td), x_td.shape[1:], eps=eps)
    return modulated(normed_td, None, scale_nd, shift_nd, sample_id_t, x_td.dtype)


def _forward_triton(
    x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return modulated_norm.forward(x_td, None, scale_nd, shift_nd, sample_id_t, eps, centred=True)[1:]


@fused("layer_norm_modulate", _forward_triton)
def _forward(
    x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The result, and 1/deviation and mean of each token (2, T)."""
    normed, moments = layer_normed(x_td, eps)
    return modulated(normed, None, scale_nd, shift_nd, sample_id_t, x_td.dtype), moments


def _backward_triton(
    grad_td: Tensor, x_td: Tensor, scale_nd: Tensor, sample_id_t: Tensor, moments_mt: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grads = modulated_norm.backward(grad_td, x_td, None, scale_nd, shift_dtype, sample_id_t, moments_mt)
    return grads[0], grads[2], grads[3]


@fused("layer_norm_modulate_backward", _backward_triton)
def _backward(
    grad_td: Tensor, x_td: Tensor, scale_nd: Tensor, sample_id_t: Tensor, moments_mt: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift."""
    grad_x, *grads = modulated_backward(grad_td, x_td, None, scale_nd, sample_id_t, moments_mt, shift_dtype)
    return grad_x.to(x_td.dtype), *grads


def _save(ctx, inputs, output):
    x, scale, shift, sample_id, _ = inputs
    ctx.save_for_backward(x, scale, sample_id, output[1])
    ctx.shift_dtype = shift.dtype


def _differentiate(ctx, grad_out, _):
    return *_backward(grad_out, *ctx.saved_tensors, ctx.shift_dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@layer_norm_modulate.implementation("triton", usable=triton_support.usable)
def _fused(x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float) -> Tensor:
    return _forward(x_td, scale_nd, shift_nd, sample_id_t, eps)[0]
