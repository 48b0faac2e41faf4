"""RMSNorm with weight, alone or followed by the per-sample modulation of adaptive layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modulated_norm, triton_support
from .checks import expect_pack
from .dispatch import Operation
from .optional import apex_layer_norm
from .reference import modulated, modulated_backward, rms_normed
from .registration import fused


@Operation
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dim of `x`, in fp32 whatever the dtype."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@rms_norm.implementation("apex", usable=lambda x: x.is_cuda and apex_layer_norm() is not None)
def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return apex_layer_norm().fused_rms_norm_affine(x, weight, tuple(weight.shape), eps)


def _check(x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float) -> None:
    expect_pack(x_td, sample_id_t, {}, {"scale": scale_nd, "shift": shift_nd}, weight_d)


@Operation.checked(_check)
def rms_norm_modulate(
    x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> Tensor:
    """``RMSNorm(x) · (1 + scale) + shift``, scale and shift of the sample each token belongs to; fp32 inside.

    Shapes: x (T, D) tokens; weight (D,); scale, shift (N, D) samples; sample_id (T,) in [0, N), sorted.
    """
    return modulated(rms_normed(x_td, eps)[0], weight_d, scale_nd, shift_nd, sample_id_t, x_td.dtype)


def _forward_triton(
    x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return modulated_norm.forward(x_td, weight_d, scale_nd, shift_nd, sample_id_t, eps, centred=False)[1:]


@fused("rms_norm_modulate", _forward_triton)
def _forward(
    x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The result, and 1/rms of each token (1, T)."""
    normed, moments = rms_normed(x_td, eps)
    return modulated(normed, weight_d, scale_nd, shift_nd, sample_id_t, x_td.dtype), moments


def _backward_triton(
    grad_td: Tensor,
    x_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return modulated_norm.backward(grad_td, x_td, weight_d, scale_nd, shift_dtype, sample_id_t, moments_mt)


@fused("rms_norm_modulate_backward", _backward_triton)
def _backward(
    grad_td: Tensor,
    x_td: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale and shift."""
    grad_x, *grads = modulated_backward(grad_td, x_td, weight_d, scale_nd, sample_id_t, moments_mt, shift_dtype)
    return grad_x.to(x_td.dtype), *grads


def _save(ctx, inputs, output):
    x, weight, scale, shift, sample_id, _ = inputs
    ctx.save_for_backward(x, weight, scale, sample_id, output[1])
    ctx.shift_dtype = shift.dtype


def _differentiate(ctx, grad_out, _):
    return *_backward(grad_out, *ctx.saved_tensors, ctx.shift_dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@rms_norm_modulate.implementation("triton", usable=triton_support.usable)
def _fused(
    x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> Tensor:
    return _forward(x_td, weight_d, scale_nd, shift_nd, sample_id_t, eps)[0]
