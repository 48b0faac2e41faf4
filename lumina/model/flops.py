"""Model FLOPs of a forward pass, counted by hand: what MFU is made of.

A multiply-add is two FLOPs. Norms, activations and softmax are left out, recomputation is never counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lumina.model.config import FlagDiTConfig
from lumina.model.modulation import FREQUENCIES


@dataclass(frozen=True)
class Flops:
    """Of one forward pass; backward costs twice as much again.

    gemm: of products with weights, `in_blocks` of them in the blocks: what recomputation does once more.
    attention: of products of queries with keys, and of weights with values.
    """

    gemm: int
    in_blocks: int
    attention: int

    @property
    def total(self) -> int:
        return self.gemm + self.attention

    def of_step(self, frozen: bool) -> int:
        """Forward and backward; of `frozen` weights the backward pass makes no gradients."""
        return (2 if frozen else 3) * self.gemm + 3 * self.attention

    def again(self, recompute: str) -> int:
        """What the backward pass does again: nothing of "none", of "selective" all of the blocks but attention."""
        return {"none": 0, "selective": self.in_blocks, "full": self.in_blocks + self.attention}[recompute]


def forward_flops(config: FlagDiTConfig, lengths: Sequence[int], caption_lengths: Sequence[int] = ()) -> Flops:
    """FLOPs of one forward pass over samples of these lengths in tokens.

    Args:
        lengths: tokens of each sample, learned tokens counted.
        caption_lengths: caption tokens of each sample; empty in a label-conditional model.
    """
    dim, width, kv = config.dim, config.condition_width, config.kv_heads * config.head_dim
    tokens, samples, caption_tokens = sum(lengths), len(lengths), sum(caption_lengths)
    projections = 2 * dim * (2 * dim + 2 * kv) + 6 * dim * config.ffn_dim
    modulation = 2 * width * 6 * dim
    in_layer = projections * tokens + modulation * samples
    attention = sum(4 * length * length * dim for length in lengths)
    if caption_lengths:
        in_layer += 4 * config.cap_feat_dim * kv * caption_tokens
        attention += sum(4 * t * s * dim for t, s in zip(lengths, caption_lengths, strict=True))

    patch = config.patch_size**2
    ends = 2 * tokens * dim * patch * (config.in_channels + config.out_channels)
    conditioning = 2 * width * (FREQUENCIES + width + 2 * dim)
    if caption_lengths:
        conditioning += 2 * config.cap_feat_dim * width
    in_blocks = config.n_layers * in_layer
    return Flops(in_blocks + ends + conditioning * samples, in_blocks, config.n_layers * attention)
