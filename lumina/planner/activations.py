"""Activations of a rank, tensor by tensor: what waits for the backward pass, and what is beside it at its fullest.

Read off what autograd saves in `lumina.model` and `lumina.parallel`, and held against a simulation of both.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.parallel.cuts import bounds, kv_head_counts
from lumina.planner.traffic import FP32, WIDTH, Load, Place


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank and one forward pass.

    kept: what waits for the backward pass, of all blocks and what is around them.
    in_blocks: of that, what `offload_activations` moves to the host.
    working: beside it, at the fullest moment of the backward pass.
    """

    kept: int
    in_blocks: int
    working: int


def activations(
    sizes: FlagDiTConfig, parallel: ParallelConfig, precision: str, load: Load, place: Place
) -> Activations:
    """Of a forward pass over `load` of the rank at `place`."""
    return _activations(sizes, tuple((name, getattr(parallel, name)) for name in _DECIDING), precision, load, place)


_DECIDING = ("tensor", "pipeline", "ring", "ulysses", "sequence", "recompute")


@lru_cache(maxsize=2**16)  # a search asks the same of every ZeRO stage
def _activations(
    sizes: FlagDiTConfig, settings: tuple[tuple[str, Any], ...], precision: str, load: Load, place: Place
) -> Activations:
    parallel = ParallelConfig.model_construct(**dict(settings))
    block = _Block(sizes, parallel, WIDTH[precision], load, place)
    whole = block.whole
    kept = {"none": whole, "full": block.entering, "selective": block.entering + block.attention_result}
    of_block = kept[parallel.recompute]
    # What a recomputed block holds again, while its own backward pass runs.
    again = whole - of_block
    in_blocks = len(place.blocks) * of_block
    fullest = again + max(block.backward) - block.head
    return Activations(in_blocks + block.around, in_blocks, max(0, fullest) + block.received_into)


class _Block:
    """Sizes in bytes; rows are of tokens that this rank holds between regions of tensor parallelism, or has in them."""

    def __init__(self, sizes: FlagDiTConfig, parallel: ParallelConfig, width: int, load: Load, place: Place):
        self.sizes, self.parallel, self.width, self.load, self.place = sizes, parallel, width, load, place
        self.held, self.tokens = place.held(load, parallel), place.tokens(load, parallel)
        self.samples, self.caption_tokens = len(load.lengths), sum(load.captions)
        kv_heads = sizes.kv_heads // parallel.tensor
        repeats = sizes.n_heads // sizes.kv_heads
        self.query, self.kv = (self.tokens * heads * sizes.head_dim for heads in (kv_heads * repeats, kv_heads))
        self.heads = kv_heads * repeats
        if parallel.ulysses > 1:
            first = place.ring * parallel.ulysses
            starts = bounds(load.tokens, parallel.ring * parallel.ulysses)
            self.exchanged = starts[first + parallel.ulysses] - starts[first]
            self.kv_here = kv_head_counts(kv_heads, parallel.ulysses)[place.ulysses]
            self.heads_here = self.kv_here * repeats
        else:
            self.exchanged, self.kv_here, self.heads_here = self.tokens, kv_heads, self.heads

    @property
    def entering(self) -> int:
        return self.held * self.sizes.dim * self.width

    @property
    def gathered(self) -> int:
        """A row of the model's width for each token of a region."""
        return self.tokens * self.sizes.dim * self.width

    @property
    def feed_forward(self) -> int:
        return self.tokens * self.sizes.ffn_dim // self.parallel.tensor * self.width

    @property
    def attention_result(self) -> int:
        """Output and log-sum-exp of self-attention, where it runs."""
        return self.exchanged * self.heads_here * (self.sizes.head_dim * self.width + FP32)

    @property
    def attention_arguments(self) -> int:
        """Queries, keys and values, where it runs."""
        return self.exchanged * (self.heads_here + 2 * self.kv_here) * self.sizes.head_dim * self.width

    @cached_property
    def text(self) -> int:
        """Normed captions, keys before and after their norm, values, the output and its log-sum-exp."""
        if not self.load.captions:
            return 0
        sizes = self.sizes
        keys = (2 + sizes.qk_norm) * sizes.kv_heads * sizes.head_dim // self.parallel.tensor
        of_captions = self.caption_tokens * (sizes.cap_feat_dim * (self.width + FP32) + keys * self.width)
        return of_captions + self.query * self.width + self.tokens * self.heads * FP32

    @cached_property
    def whole(self) -> int:
        """Of a block that is not recomputed."""
        before_norm = (self.query + self.kv) * self.width if self.sizes.qk_norm else 0
        attention = self.attention_arguments + self.attention_result + self.text
        if self.load.captions:
            attention += self.query * self.width  # the sum of both outputs, which wo takes
            if self.parallel.ulysses > 1:
                attention += self.query * self.width  # queries as the text branch takes them
        elif self.parallel.ulysses > 1:
            attention += self.query * self.width  # the output, back from the exchange
        moments = FP32 * (2 * self.held + 4 * self.tokens * self.sizes.qk_norm)
        modulation = self.samples * (6 * self.sizes.dim + 2 * self.sizes.condition_width) * self.width
        rows = 4 * self.entering + 2 * self.gathered + 3 * self.feed_forward
        return rows + before_norm + attention + moments + modulation

    @property
    def backward(self) -> tuple[int, ...]:
        """Beside a whole block, at three moments of its backward pass."""
        width, sizes = self.width, self.sizes
        activation = 2 * self.feed_forward  # its gradients; what was made of its result is gone by then
        weight = sizes.dim * sizes.ffn_dim // self.parallel.tensor * width
        down = self.gathered + self.feed_forward + weight
        gone = 3 * self.entering + self.gathered + 3 * self.feed_forward
        grads = self.entering + self.query * width
        if self.load.captions:
            gone += self.query * width + self.text
            grads += self.query * width
        attention = self.attention_arguments
        if self.parallel.ring > 1:
            queries = self.exchanged * self.heads_here * sizes.head_dim
            keys = 2 * self.exchanged * self.kv_here * sizes.head_dim
            # Sums in fp32, those of keys twice, one on its way; keys twice; and a block's own gradients.
            attention += queries * FP32 + 2 * keys * FP32 + 2 * keys * width
        return activation, down, grads + attention - gone

    @property
    def head(self) -> int:
        """What the last layer keeps: gone by the time the last block's backward pass is at its fullest."""
        return 2 * self.entering if self.place.blocks.stop == self.sizes.n_layers else 0

    @property
    def around(self) -> int:
        """Outside the blocks: angles, captions, patches on their way in and out, what goes from stage to stage."""
        sizes = self.sizes
        patch = self.held * sizes.patch_size**2 * sizes.in_channels
        shared = self.tokens * sizes.head_dim * FP32 + self.caption_tokens * (sizes.cap_feat_dim or 0) * self.width
        shared += patch * (FP32 + self.width) if self.place.blocks.start == 0 else self.entering
        shared += patch * FP32 + self.head if self.head else self.entering
        return shared

    @property
    def received_into(self) -> int:
        """A pipeline's buffers: x, or its gradient."""
        return self.entering if self.parallel.pipeline > 1 else 0
