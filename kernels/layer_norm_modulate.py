"""LayerNorm without affine parameters, modulated per sample: Flag-DiT's last norm."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Operation


@Operation
def layer_norm_modulate(x_td: Tensor, scale_nd: Tensor, shift_nd: Tensor, sample_id_t: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) · (1 + scale) + shift``, the norm in fp32 whatever the dtype.

    Shapes: x (T, D) tokens; scale, shift (N, D) samples; sample_id (T,) in [0, N).
    """
    normed = F.layer_norm(x_td.float(), x_td.shape[-1:], eps=eps).to(x_td.dtype)
    return normed * (1 + scale_nd[sample_id_t]) + shift_nd[sample_id_t]
