"""Attention of other reach than a token's own sample and caption: captions on regions, and keys shared by samples.

Both are plans over the same packed sequence: tokens are sorted into groups, or keys are gathered, and the kernels see
block-diagonal attention as always. Nothing is masked, so that no softmax is over nothing.

Shape suffixes: t token of the pack, s key, g group of tokens.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lumina.kernels import AttentionPlan
from lumina.model.tokens import Captions, Layout


@dataclass(frozen=True, eq=False)
class CaptionGroups:
    """Tokens of a pack parted by the caption that they follow, which may be finer than by sample.

    group_t: the group of each token; every group has one at least.
    captions: of each group.
    sample_g: the sample that each group is part of.
    """

    group_t: Int[Tensor, "t"]
    captions: Captions
    sample_g: Int[Tensor, "g"]

    @functools.cached_property
    def order_t(self) -> Int[Tensor, "t"]:
        """The tokens, group after group."""
        return self.group_t.argsort(stable=True)

    @functools.cached_property
    def plan(self) -> AttentionPlan:
        """Tokens in `order_t` and their captions."""
        counts = torch.bincount(self.group_t, minlength=len(self.captions.lengths)).tolist()
        if 0 in counts:
            raise ValueError(f"caption {counts.index(0)} has no token that follows it")
        return AttentionPlan(tuple(counts), self.captions.lengths, self.group_t.device)


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Self-attention in which samples see tokens of others as well.

    source_s: the tokens whose keys and values are seen, sample by sample of those that see.
    plan: all tokens, and how many of `source_s` each sample sees.
    """

    source_s: Int[Tensor, "s"]
    plan: AttentionPlan

    @staticmethod
    def of(layout: Layout, seen: Sequence[Sequence[int]]) -> "SharedKeys":
        """`seen[i]` are the samples whose tokens sample i sees, its own number among them where it sees itself."""
        device = layout.position_t.device
        tokens = torch.arange(len(layout.position_t), device=device).split(layout.lengths)
        keys = tuple(sum(layout.lengths[j] for j in others) for others in seen)
        source = torch.cat([tokens[j] for others in seen for j in others])
        return SharedKeys(source, AttentionPlan(layout.lengths, keys, device))


@dataclass(frozen=True, eq=False)
class Reach:
    """What a forward pass has of the two."""

    groups: CaptionGroups | None = None
    keys: SharedKeys | None = None


OWN = Reach()
