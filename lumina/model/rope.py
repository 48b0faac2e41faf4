"""Rotary angles, computed for the positions at hand: no table, so no longest sequence and nothing to reset."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class Extrapolation:
    """How a model is run at lengths it was not trained on (Lumina-T2X, arXiv 2405.05945, section 2.3).

    rope_scaling_factor: positions are divided by it (position interpolation).
    ntk_factor: multiplies the rotary base (NTK-aware scaling).
    base_seqlen: the trained length in tokens, given where attention is to be proportional: scores are scaled
        by sqrt(log(length)/log(base_seqlen)) so that the entropy of attention stays as it was in training.
    """

    rope_scaling_factor: float = 1.0
    ntk_factor: float = 1.0
    base_seqlen: int | None = None

    def __post_init__(self):
        if self.rope_scaling_factor <= 0 or self.ntk_factor <= 0:
            raise ValueError(
                f"rope_scaling_factor and ntk_factor must be positive, not {self.rope_scaling_factor:g} "
                f"and {self.ntk_factor:g}"
            )
        if self.base_seqlen is not None and self.base_seqlen < 2:
            raise ValueError(f"base_seqlen is the trained length in tokens, at least 2, not {self.base_seqlen}")

    def query_scale(self, length: int) -> float:
        """What the queries of a sample of `length` tokens are multiplied by in self-attention."""
        if self.base_seqlen is None:
            return 1.0
        return math.sqrt(math.log(length) / math.log(self.base_seqlen))


TRAINED = Extrapolation()


def rotary_cos_sin(
    position_t: Int[Tensor, "t"], head_dim: int, extrapolation: Extrapolation = TRAINED
) -> tuple[Float[Tensor, "t half"], Float[Tensor, "t half"]]:
    """cos and sin of the angle of each pair (2i, 2i+1): position / scaling · (10000·ntk)^(-2i/head_dim), fp32.

    The product is taken in float64: at position 131,071 a float32 angle would be off by 0.004 rad.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_t.device) / head_dim
    frequencies = (THETA * extrapolation.ntk_factor) ** -pairs
    angles = torch.outer(position_t.double() / extrapolation.rope_scaling_factor, frequencies)
    return angles.cos().float(), angles.sin().float()
