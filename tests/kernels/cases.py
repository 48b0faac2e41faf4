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
        [numbers(tokens, width, seed=0), gate, numbers(tokens, width, seed=1), numbers(width, seed=3) + 1, scale, shift],
        lambda f, *a: f(*a, ids, 1e-5),
        plain,
    )


PACKED = {case.__name__: case for case in (rms_norm_modulate, layer_norm_modulate, gated_residual, gated_residual_norm)}
"""Operations on the tokens of a pack, by name: (lengths, width, device) -> Case."""


CASES = PACKED
"""All of them."""
