"""The fused operations as the tests call them: inputs that take a gradient, the fused call, and its plain formula."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina import kernels
from tests.kernels.plain import (
    numbers,
    plain_gated_sum,
    plain_layer_norm,
    plain_modulated,
    plain_rms_norm,
    plain_rotated,
    plain_swiglu,
)

PACKS = {
    "one sample": (11,),
    "ragged": (5, 1, 9, 3),
    "with empty samples": (0, 4, 0, 17, 2, 0),
}


@dataclass(frozen=True)
class Case:
    """`call(operation, *inputs)` runs an implementation of `operation`; `plain(*inputs)` is the formula."""

    operation: kernels.dispatch.Operation
    inputs: list[Tensor]
    call: Callable
    plain: Callable

    def fused(self, *inputs: Tensor):
        return self.call(self.operation.named("triton"), *inputs)


def sample_id(lengths, device="cpu"):
    return torch.repeat_interleave(torch.tensor(lengths)).to(device)


def vectors(lengths, width, count, seed):
    """As the modulation gives them: `count` (N, D) tensors side by side, each a strided view."""
    return list(numbers(len(lengths), count * width, seed=seed).chunk(count, -1))


def rms_norm_modulate(lengths, width, device="cpu"):
    ids, tokens = sample_id(lengths, device), sum(lengths)
    scale, shift = vectors(lengths, width, 2, seed=2)
    return Case(
        kernels.rms_norm_modulate,
        [numbers(tokens, width, seed=0, scale=3), numbers(width, seed=1) + 1, scale, shift],
        lambda f, *a: f(*a, ids, 1e-5),
        lambda x, weight, scale, shift: plain_modulated(plain_rms_norm(x, weight), scale, shift, ids),
    )


def layer_norm_modulate(lengths, width, device="cpu"):
    ids, tokens = sample_id(lengths, device), sum(lengths)
    scale, shift = vectors(lengths, width, 2, seed=2)
    return Case(
        kernels.layer_norm_modulate,
        [numbers(tokens, width, seed=0, scale=3) + 2, scale, shift],
        lambda f, *a: f(*a, ids, 1e-6),
        lambda x, scale, shift: plain_modulated(plain_layer_norm(x, 1e-6), scale, shift, ids),
    )


def gated_residual(lengths, width, device="cpu"):
    ids, tokens = sample_id(lengths, device), sum(lengths)
    gate, _ = vectors(lengths, width, 2, seed=1)
    return Case(
        kernels.gated_residual,
        [numbers(tokens, width, seed=0), gate, numbers(tokens, width, seed=2)],
        lambda f, *a: f(*a, ids),
        lambda *a: plain_gated_sum(*a, ids),
    )


def gated_residual_norm(lengths, width, device="cpu"):
    ids, tokens = sample_id(lengths, device), sum(lengths)
    gate, scale, shift = vectors(lengths, width, 3, seed=2)

    def plain(x, gate, y, weight, scale, shift):
        summed = plain_gated_sum(x, gate, y, ids)
        return summed, plain_modulated(plain_rms_norm(summed, weight), scale, shift, ids)

    return Case(
        kernels.gated_residual_norm,
        [
            numbers(tokens, width, seed=0),
            gate,
            numbers(tokens, width, seed=1),
            numbers(width, seed=3) + 1,
            scale,
            shift,
        ],
        lambda f, *a: f(*a, ids, 1e-5),
        plain,
    )


PACKED = {case.__name__: case for case in (rms_norm_modulate, layer_norm_modulate, gated_residual, gated_residual_norm)}
"""Operations on the tokens of a pack, by name: (lengths, width, device) -> Case."""


def swiglu(tokens, width):
    inputs = [numbers(tokens, width, seed=0, scale=4), numbers(tokens, width, seed=1)]
    return Case(kernels.swiglu, inputs, lambda f, *a: f(*a), plain_swiglu)


def swiglu_packed(tokens, width):
    inputs = [numbers(2, tokens, 2 * width, seed=0, scale=4)]
    return Case(kernels.swiglu, inputs, lambda f, ab: f(ab), lambda ab: plain_swiglu(*ab.chunk(2, -1)))


@dataclass
class OneRank:
    """What a rank that shares its width with none tells itself, and what was told."""

    told: list[Tensor]

    def moments(self, local_4t: Tensor) -> Tensor:
        self.told.append(local_4t)
        return local_4t.clone()

    means = moments


def qk_norm_rope(tokens, heads=4, kv_heads=2, head_dim=24, normed=True, shared=False, device="cpu"):
    q_width, k_width = heads * head_dim, kv_heads * head_dim
    frequencies = torch.logspace(0, -2, head_dim // 2)
    angles = torch.arange(tokens)[:, None] * frequencies + 40.0
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    inputs = [numbers(tokens, q_width, seed=0) + 1, numbers(tokens, k_width, seed=1) * 2 - 1]
    if normed:
        inputs += [numbers(width, seed=2 + i) for i, width in enumerate((q_width, q_width, k_width, k_width))]

    def call(f, q, k, *affine):
        return f(q, k, *(affine or [None] * 4), cos, sin, OneRank([]) if shared else None)

    def plain(q, k, *affine):
        if affine:
            q = plain_layer_norm(q, 1e-5) * affine[0] + affine[1]
            k = plain_layer_norm(k, 1e-5) * affine[2] + affine[3]
        return plain_rotated(q, cos, sin), plain_rotated(k, cos, sin)

    return Case(kernels.qk_norm_rope, inputs, call, plain)


def cases(lengths, width):
    """Every operation in every form."""
    tokens, made = sum(lengths), {name: make(lengths, width) for name, make in PACKED.items()}
    made |= {"swiglu": swiglu(tokens, width), "swiglu_packed": swiglu_packed(tokens, width)}
    made["qk_norm_rope"] = qk_norm_rope(tokens)
    made["qk_norm_rope shared"] = qk_norm_rope(tokens, shared=True)
    made["qk_norm_rope not normed"] = qk_norm_rope(tokens, normed=False)
    return made
