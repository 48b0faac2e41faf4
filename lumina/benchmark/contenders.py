"""What the fused kernels are measured against: eager torch, torch.compile, Liger and apex.

Written as their users would, on a batch of samples of equal length, so that nobody gathers what belongs to a sample.
Shape suffixes: n sample, l token of a sample, d model dim.
"""

import functools
import importlib
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch

from lumina.kernels.optional import apex_layer_norm
from lumina.kernels.qk_norm_rope import LAYER_NORM_EPS

Contender = Callable[..., Tensor | tuple[Tensor, ...]]


def liger(module: str, function: str) -> Callable | None:
    """A function of liger-kernel's (its kernels run on CUDA alone), or None."""
    try:
        found = importlib.import_module(f"liger_kernel.ops.{module}")
    except ImportError:
        return None
    return getattr(found, function).apply


def compiles(device: torch.device) -> bool:
    """Whether torch.compile can make code for this device here."""
    return device.type == "cuda" or shutil.which("g++") is not None


def compiled(function: Contender) -> Contender:
    """`function` by torch.compile, for one set of shapes."""
    functorch.donated_buffer = False  # or a backward pass could not be repeated
    return torch.compile(function, dynamic=False, fullgraph=True)


# Eager torch, with its own fused norms.


def rms_norm_modulate(x_nld: Tensor, weight_d: Tensor, scale_nd: Tensor, shift_nd: Tensor, eps: float) -> Tensor:
    return modulate(F.rms_norm(x_nld, weight_d.shape, weight_d, eps), scale_nd, shift_nd)


def layer_norm_modulate(x_nld: Tensor, scale_nd: Tensor, shift_nd: Tensor, eps: float) -> Tensor:
    return modulate(F.layer_norm(x_nld, x_nld.shape[-1:], eps=eps), scale_nd, shift_nd)


def modulate(x_nld: Tensor, scale_nd: Tensor, shift_nd: Tensor) -> Tensor:
    return x_nld * (1 + scale_nd[:, None]) + shift_nd[:, None]


def gated_residual(x_nld: Tensor, gate_nd: Tensor, y_nld: Tensor) -> Tensor:
    return torch.addcmul(x_nld, gate_nd[:, None], y_nld)


def gated_residual_norm(
    x_nld: Tensor,
    gate_nd: Tensor,
    y_nld: Tensor,
    weight_d: Tensor,
    scale_nd: Tensor,
    shift_nd: Tensor,
    eps: float,
    normed: Contender = rms_norm_modulate,
) -> tuple[Tensor, Tensor]:
    sum_nld = gated_residual(x_nld, gate_nd, y_nld)
    return sum_nld, normed(sum_nld, weight_d, scale_nd, shift_nd, eps)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        _rotated(F.layer_norm(q, q_weight.shape, q_weight, q_bias, LAYER_NORM_EPS), cos, sin),
        _rotated(F.layer_norm(k, k_weight.shape, k_weight, k_bias, LAYER_NORM_EPS), cos, sin),
    )


def _rotated(x_tw: Tensor, cos_th: Tensor, sin_th: Tensor) -> Tensor:
    even, odd = x_tw.float().unflatten(-1, (-1, cos_th.shape[-1], 2)).unbind(-1)
    cos, sin = cos_th[:, None], sin_th[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x_tw.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def merge_attention(out_the: Tensor, lse_th: Tensor, block_out_the: Tensor, block_lse_th: Tensor) -> None:
    """In place, as ring attention is commonly written."""
    weight = torch.sigmoid(block_lse_th - lse_th)[..., None]
    out_the -= weight * (out_the - block_out_the)
    lse_th -= F.logsigmoid(lse_th - block_lse_th)


def ema(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """In place, as it is commonly written: two passes."""
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, weights, alpha=1 - decay)


# With Liger's and apex's kernels where they have them, and eager torch around them.


def liger_rms_norm_modulate() -> Contender | None:
    function = liger("modulated_rms_norm", "LigerModulatedRMSNormFunction")
    if function is None:
        return None
    # Not in place: that would overwrite the gradient that every repetition is given.
    return lambda x, weight, scale, shift, eps: function(x, weight, scale, shift, eps, 0.0, "llama", False)


def liger_layer_norm_modulate() -> Contender | None:
    function = liger("layer_norm", "LigerLayerNormFunction")
    if function is None:
        return None

    def run(x_nld: Tensor, scale_nd: Tensor, shift_nd: Tensor, eps: float) -> Tensor:
        ones, zeros = x_nld.new_ones(x_nld.shape[-1]), x_nld.new_zeros(x_nld.shape[-1])
        return modulate(function(x_nld, ones, zeros, eps), scale_nd, shift_nd)

    return run


def liger_qk_norm_rope() -> Contender | None:
    """Liger rotates halves of a head instead of pairs: as many bytes, other numbers."""
    norm, rope = liger("layer_norm", "LigerLayerNormFunction"), liger("rope", "LigerRopeFunction")
    if norm is None or rope is None:
        return None

    def run(q, k, q_weight, q_bias, k_weight, k_bias, cos_th, sin_th):
        cos, sin = (torch.cat((x, x), -1)[None] for x in (cos_th, sin_th))
        heads = [
            norm(x, weight, bias, LAYER_NORM_EPS).unflatten(-1, (-1, cos.shape[-1])).transpose(0, 1)[None]
            for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias))
        ]
        return tuple(x[0].transpose(0, 1) for x in rope(*heads, cos, sin))

    return run


def liger_swiglu() -> Contender | None:
    return liger("swiglu", "LigerSiLUMulFunction")


def apex_rms_norm_modulate() -> Contender | None:
    if apex_layer_norm() is None:
        return None
    norm = apex_layer_norm().fused_rms_norm_affine
    return lambda x, weight, scale, shift, eps: modulate(norm(x, weight, tuple(weight.shape), eps), scale, shift)


def apex_layer_norm_modulate() -> Contender | None:
    if apex_layer_norm() is None:
        return None
    norm = apex_layer_norm().fused_layer_norm
    return lambda x, scale, shift, eps: modulate(norm(x, x.shape[-1:], eps), scale, shift)


def with_residual(normed: Contender | None) -> Contender | None:
    """`gated_residual_norm` around another's modulated norm."""
    return normed and functools.partial(gated_residual_norm, normed=normed)
