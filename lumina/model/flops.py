"""Model FLOPs of a forward pass, counted by hand: what MFU is made of.

A multiply-add is two FLOPs. Norms, activations and softmax are left out, recomputation is never counted.
"""

from collections.abc import Sequence

from lumina.model.config import FlagDiTConfig
from lumina.model.modulation import FREQUENCIES


def forward_flops(config: FlagDiTConfig, lengths: Sequence[int], caption_lengths: Sequence[int] = ()) -> int:
    """FLOPs of one forward pass over samples of these lengths in tokens; backward costs twice as much again.

    Args:
        lengths: tokens of each sample, learned tokens counted.
        caption_lengths: caption tokens of each sample; empty in a label-conditional model.
    """
    dim, width, kv = config.dim, config.condition_width, config.kv_heads * config.head_dim
    tokens, samples, caption_tokens = sum(lengths), len(lengths), sum(caption_lengths)
    projections = 2 * dim * (2 * dim + 2 * kv) + 6 * dim * config.ffn_dim
    attention = sum(4 * length * length * dim for length in lengths)
    modulation = 2 * width * 6 * dim
    text = 0
    if caption_lengths:
        text = 4 * config.cap_feat_dim * kv * caption_tokens
        text += sum(4 * t * s * dim for t, s in zip(lengths, caption_lengths, strict=True))
    layer = projections * tokens + attention + modulation * samples + text

    patch = config.patch_size**2
    ends = 2 * tokens * dim * patch * (config.in_channels + config.out_channels)
    conditioning = 2 * width * (FREQUENCIES + width + 2 * dim)
    if caption_lengths:
        conditioning += 2 * config.cap_feat_dim * width
    return config.n_layers * layer + ends + conditioning * samples
