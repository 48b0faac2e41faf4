"""Formulas that the references share, in plain torch: fp32 inside (float64 for float64), rounded once at the end.

Backward formulas are written out, since nothing within a custom op is recorded for autograd.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype in which is computed."""
    return x if x.dtype == torch.float64 else x.float()


def rms_normed(x_td: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms and 1/rms (1, T), through which nothing is differentiated."""
    normed_td, inverse = _RmsNormed.apply(wide(x_td), eps)
    return normed_td, inverse.reshape(1, -1)


class _RmsNormed(torch.autograd.Function):
    """Its gradient in three passes over the tokens; autograd takes some ten, and keeps x besides."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_t1 = (x_td.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed_td = x_td * inverse_t1
        ctx.save_for_backward(normed_td, inverse_t1)
        ctx.mark_non_differentiable(inverse_t1)
        return normed_td, inverse_t1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_td: Tensor, _: Tensor) -> tuple[Tensor, None]:
        normed_td, inverse_t1 = ctx.saved_tensors
        along_t1 = (grad_td * normed_td).mean(-1, keepdim=True)
        return torch.addcmul(grad_td, normed_td, along_t1, value=-1).mul_(inverse_t1), None


def layer_normed(x_td: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm(x), and 1/deviation and mean (2, T)."""
    x = wide(x_td)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, torch.cat((inverse, mean), -1).mT.contiguous()


def modulated(
    normed_td: Tensor,
    weight_d: Tensor | None,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``normed · weight · (1 + scale) + shift``, in what torch makes of `dtype`, scale and shift together."""
    factor = 1 + wide(scale_nd)
    if weight_d is not None:
        factor = factor * wide(weight_d)
    out = torch.addcmul(of_token(wide(shift_nd), sample_id_t), normed_td, of_token(factor, sample_id_t))
    return out.to(torch.promote_types(dtype, torch.promote_types(scale_nd.dtype, shift_nd.dtype)))


def modulated_backward(
    grad_td: Tensor,
    x_td: Tensor,
    weight_d: Tensor | None,
    scale_nd: Tensor,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of x (not yet rounded), weight (unless None), scale and shift of a modulated norm.

    With moments (1, T) of an RMSNorm, with (2, T) of a LayerNorm.
    """
    x, grad, inverse = wide(x_td), wide(grad_td), moments_mt[0, :, None]
    centred = len(moments_mt) == 2
    normed = (x - moments_mt[1, :, None]) * inverse if centred else x * inverse
    factor = 1 + wide(scale_nd)
    along_nd = sum_of_samples(grad * normed, sample_id_t, len(scale_nd))
    grad_shift = sum_of_samples(grad, sample_id_t, len(scale_nd)).to(shift_dtype)
    grad = grad * of_token(factor, sample_id_t)
    grads = [along_nd, grad_shift]
    if weight_d is not None:
        weight = wide(weight_d)
        grad = grad * weight
        grads = [(along_nd * factor).sum(0).to(weight_d.dtype), along_nd * weight, grad_shift]
    grads[-2] = grads[-2].to(scale_nd.dtype)
    back = grad - normed * (grad * normed).mean(-1, keepdim=True)
    if centred:
        back = back - grad.mean(-1, keepdim=True)
    return back * inverse, *grads


def of_token(x_nd: Tensor, sample_id_t: Tensor) -> Tensor:
    """(T, D): that of the sample each token belongs to."""
    return F.embedding(sample_id_t, x_nd)  # faster on a CPU than indexing, backward above all


def sum_of_samples(x_td: Tensor, sample_id_t: Tensor, samples: int) -> Tensor:
    """(N, D): the sum of each sample's tokens."""
    return x_td.new_zeros(samples, x_td.shape[-1]).index_add(0, sample_id_t, x_td)


def gated_sum(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    """``x + gate · y`` in the dtype of x, gate of the sample each token belongs to."""
    return torch.addcmul(wide(x_td), of_token(wide(gate_nd), sample_id_t), wide(y_td)).to(x_td.dtype)
