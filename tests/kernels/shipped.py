"""Every launch that the shipped models make, on meta tensors: what is compiled ahead of time."""

import functools
from dataclasses import dataclass

import torch

from lumina.kernels.registration import TRITON

TOKENS, SAMPLES = 131072, 8


@dataclass(frozen=True)
class Model:
    name: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tensor_ranks: int = 1
    attention_alone: bool = False  # where the rest is as in another model


MODELS = (
    Model("600M", 1536, 32, 32, 48, 4096),
    Model("3B, 5B", 3072, 32, 32, 96, 8192),
    Model("7B", 4096, 32, 32, 128, 11008),
    Model("7B, 8 key heads", 4096, 32, 8, 128, 11008, attention_alone=True),
    Model("7B, 4 tensor ranks", 4096, 32, 32, 128, 11008, tensor_ranks=4),
    Model("heads of 72", 2304, 32, 32, 72, 6144, attention_alone=True),
)


def run(model: Model, dtype: torch.dtype) -> None:
    """Forward and backward of every operation at this model's sizes."""
    _run_attention(model, dtype)
    if not model.attention_alone:
        _run_rest(model, dtype)


def _new(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _run_rest(model: Model, dtype: torch.dtype) -> None:
    new = functools.partial(_new, dtype=dtype)
    x, y, sample_id = new(TOKENS, model.dim), new(TOKENS, model.dim), _new(TOKENS, dtype=torch.int64)
    weight, (shift, scale, gate, *_) = new(model.dim), new(SAMPLES, 6 * model.dim).chunk(6, -1)

    out, moments = TRITON["rms_norm_modulate"](x, weight, scale, shift, sample_id, 1e-5)
    TRITON["rms_norm_modulate_backward"](out, x, weight, scale, sample_id, moments, dtype)
    out, moments = TRITON["layer_norm_modulate"](x, scale, shift, sample_id, 1e-6)
    TRITON["layer_norm_modulate_backward"](out, x, scale, sample_id, moments, dtype)
    TRITON["gated_residual"](x, gate, y, sample_id)
    TRITON["gated_residual_backward"](x, gate, y, sample_id)
    arguments = (x, gate, y, weight, scale, shift, sample_id, 1e-5)
    summed, out, moments = TRITON["gated_residual_norm"](*arguments)
    TRITON["gated_residual_norm_backward"](summed, out, summed, gate, y, weight, scale, sample_id, moments, dtype)

    a, b = (new(TOKENS, model.ffn // model.tensor_ranks) for _ in range(2))
    ab = new(TOKENS, 2 * model.ffn // model.tensor_ranks)
    TRITON["swiglu"](a, b)
    TRITON["swiglu_backward"](a, a, b)
    TRITON["swiglu_packed"](ab)
    TRITON["swiglu_packed_backward"](a, ab)


def _run_attention(model: Model, dtype: torch.dtype) -> None:
    new = functools.partial(_new, dtype=dtype)
    heads, kv_heads = model.heads // model.tensor_ranks, model.kv_heads // model.tensor_ranks
    q, k = (new(TOKENS, count * model.head_dim) for count in (heads, kv_heads))
    cos = sin = new(TOKENS, model.head_dim // 2, dtype=torch.float32)
    affine = [new(x.shape[1]) for x in (q, q, k, k)]
    moments = new(4, TOKENS, dtype=torch.float32)
    outputs = TRITON["qk_norm_rope"](q, k, *affine, cos, sin)[:2]
    saved = (*outputs, q, k, *affine[1:3], cos, sin, moments)
    TRITON["qk_norm_rope_backward"](*saved)
    if model.tensor_ranks > 1:
        TRITON["qk_norm_rope_moments"](q, k)
        TRITON["qk_norm_rope"](q, k, *affine, cos, sin, moments)
        TRITON["qk_norm_rope_means_backward"](*saved)
        TRITON["qk_norm_rope_apply_backward"](*saved, moments)
    TRITON["qk_norm_rope"](q, k, *[None] * 4, cos, sin)
    TRITON["rope_backward"](*outputs, cos, sin)

    lse = new(TOKENS, heads, dtype=torch.float32)
    TRITON["merge_attention"](outputs[0].float(), lse, outputs[0], lse)
