"""KQ-norm over the full width of queries and keys, then rotary embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Operation

LAYER_NORM_EPS = 1e-5


@Operation
def qk_norm_rope(
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of q and of k over all heads together, then rotation of the pairs (2i, 2i+1) of each head.

    Shapes: q (T, heads·D), k (T, kv_heads·D); weights and biases as wide, or None for no norm; cos, sin
    (T, D/2) fp32. Returns q (T, heads, D) and k (T, kv_heads, D) in the dtype they came in; fp32 inside.
    """
    return (
        _norm_rope(q_tw, q_weight, q_bias, cos_th, sin_th),
        _norm_rope(k_tw, k_weight, k_bias, cos_th, sin_th),
    )


def _norm_rope(x_tw: Tensor, weight: Tensor | None, bias: Tensor | None, cos_th: Tensor, sin_th: Tensor) -> Tensor:
    x = x_tw.float()
    if weight is not None:
        x = F.layer_norm(x, weight.shape, weight.float(), bias.float(), LAYER_NORM_EPS)
    even, odd = x.unflatten(-1, (-1, cos_th.shape[-1], 2)).unbind(-1)
    cos, sin = cos_th[:, None], sin_th[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_tw.dtype)
