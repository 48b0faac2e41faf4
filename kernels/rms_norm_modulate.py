"""RMSNorm with weight, alone or followed by the per-sample modulation of adaptive layer norm."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Operation
from .optional import apex_layer_norm


@Operation
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dim of `x`, in fp32 whatever the dtype."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@rms_norm.implementation("apex", usable=lambda x: x.is_cuda and apex_layer_norm() is not None)
def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return apex_layer_norm().fused_rms_norm_affine(x, weight, tuple(weight.shape), eps)


@Operation
def rms_norm_modulate(
    x_td: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float
) -> Tensor:
    """``RMSNorm(x) · (1 + scale) + shift``, scale and shift of the sample each token belongs to.

    Shapes: x (T, D) tokens; weight (D,); scale, shift (N, D) samples; sample_id (T,) in [0, N).
    """
    normed = rms_norm(x_td, weight_d, eps)
    return normed * (1 + scale_nd[sample_id_t]) + shift_nd[sample_id_t]
