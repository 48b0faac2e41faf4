"""What a rank hands to the network for one forward and backward pass, call by call.

Written beside `lumina.parallel`, not read off it: a simulation of the real model, and real runs, are held against it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lumina.config.deepspeed import REDUCE_BUCKET
from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.parallel.cuts import bounds, kv_head_counts
from lumina.parallel.schedule import schedule
from lumina.planner.messages import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Message,
    Messages,
)

FP32 = 4
WIDTH = {"fp32": FP32, "bf16": 2}  # bytes of a value
GATHERED = 10**9  # elements that ZeRO 3 keeps gathered: DeepSpeed's stage3_max_live_parameters
ALL_REDUCED = 500_000_000  # elements that it flattens at once without ZeRO
FETCHED = 50_000_000  # elements that ZeRO 3 gathers at once, if blocks are smaller: stage3_prefetch_bucket_size
SHAPES_BYTES = 256 * 4  # deepspeed.runtime.pipe.engine.TENSOR_META_SIZE integers


@dataclass(frozen=True)
class Load:
    """Samples of one forward pass.

    lengths: tokens of each, learned ones counted.
    captions: tokens of each one's caption; empty in a label-conditional model.
    """

    lengths: tuple[int, ...]
    captions: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Place:
    """Of a rank, on each axis of the mesh that works on one pack; and the blocks of its pipeline stage."""

    blocks: range
    pipeline: int = 0
    ring: int = 0
    ulysses: int = 0
    tensor: int = 0

    def tokens(self, load: Load, parallel: ParallelConfig) -> int:
        """That this rank's attention has queries of before any heads are exchanged."""
        return _stretch(load.tokens, parallel.ring * parallel.ulysses, self.ring * parallel.ulysses + self.ulysses)

    def held(self, load: Load, parallel: ParallelConfig) -> int:
        """Tokens between regions of tensor parallelism."""
        tokens = self.tokens(load, parallel)
        return _stretch(tokens, parallel.tensor, self.tensor) if parallel.sequence else tokens


def fullest_place(parallel: ParallelConfig, blocks: range, pipeline: int) -> Place:
    """Of a stage: where tokens and heads do not divide, the last ranks have those that are left over."""
    return Place(blocks, pipeline, parallel.ring - 1, parallel.ulysses - 1, parallel.tensor - 1)


def _stretch(total: int, parts: int, part: int) -> int:
    return total * (part + 1) // parts - total * part // parts  # as `bounds` cuts


class _Pass:
    """The calls of one pass, forward and backward apart: recomputation makes those of a block's forward again."""

    def __init__(self, sizes: FlagDiTConfig, parallel: ParallelConfig, width: int, load: Load, place: Place):
        self.sizes, self.parallel, self.width, self.load, self.place = sizes, parallel, width, load, place
        self.tokens = place.tokens(load, parallel)
        self.samples = len(load.lengths)
        self.kv_heads = sizes.kv_heads // parallel.tensor
        self.heads = sizes.n_heads // parallel.tensor

    def modulated(self, vectors: int) -> tuple[list[Message], list[Message]]:
        """A modulation of so many vectors, of which each tensor-parallel rank makes a slice."""
        made = self.samples * vectors * self.sizes.dim * self.width
        backward = [Message("tensor", ALL_REDUCE, self.samples * self.sizes.condition_width * self.width)]
        if self.parallel.sequence:
            backward.append(Message("tensor", ALL_REDUCE, made))
        return [Message("tensor", ALL_GATHER, made)], backward

    def region(self) -> tuple[list[Message], list[Message]]:
        """In which tensor-parallel ranks share heads or columns of all tokens."""
        size, row = self.parallel.tensor, self.sizes.dim * self.width
        if self.parallel.sequence:
            whole = size * -(-self.tokens // size) * row  # equal stretches, the last of which may be padded
            both = [Message("tensor", ALL_GATHER, whole), Message("tensor", REDUCE_SCATTER, whole)]
            return both, both
        summed = [Message("tensor", ALL_REDUCE, self.tokens * row)]
        return summed, summed

    def tensor(self) -> tuple[list[Message], list[Message]]:
        """Of a block."""
        sizes, size, caption_tokens = self.sizes, self.parallel.tensor, sum(self.load.captions)
        forward, backward = self.modulated(6)
        for _ in ("attention", "feed-forward"):
            there, back = self.region()
            forward, backward = forward + there, backward + back
        moments = []
        if sizes.qk_norm:
            moments.append(4 * self.tokens * FP32)  # mean and variance of queries and of keys
            if self.load.captions:
                moments.append(2 * caption_tokens * FP32)
        forward += [Message("tensor", ALL_GATHER, size * count) for count in moments]
        backward += [Message("tensor", ALL_REDUCE, count) for count in moments]
        if self.load.captions:
            backward.append(Message("tensor", ALL_REDUCE, caption_tokens * sizes.cap_feat_dim * self.width))
        if self.parallel.sequence:  # gradients of the two norms, which each rank used on tokens of its own
            backward += [Message("tensor", ALL_REDUCE, sizes.dim * self.width)] * 2
        return forward, backward

    def ulysses(self) -> tuple[list[Message], list[Message]]:
        """Of a block: queries, keys and values one way, the output the other; backward each the other way round."""
        parallel, head = self.parallel, self.sizes.head_dim * self.width
        here = kv_head_counts(self.kv_heads, parallel.ulysses)[self.place.ulysses]
        first = self.place.ring * parallel.ulysses
        starts = bounds(self.load.tokens, parallel.ring * parallel.ulysses)
        gathered = starts[first + parallel.ulysses] - starts[first]
        split = Message("ulysses", ALL_TO_ALL, self.tokens * (self.heads + 2 * self.kv_heads) * head)
        join = Message("ulysses", ALL_TO_ALL, gathered * here * (self.heads // self.kv_heads) * head)
        split_back = Message("ulysses", ALL_TO_ALL, gathered * here * (self.heads // self.kv_heads + 2) * head)
        join_back = Message("ulysses", ALL_TO_ALL, self.tokens * self.heads * head)
        return [split, join], [split_back, join_back]

    def ring(self) -> tuple[Messages, Messages]:
        """Of a block: keys and values travel both times, and the fp32 sums of their gradients after them and home."""
        kv_heads = self.kv_heads
        if self.parallel.ulysses > 1:
            kv_heads = kv_head_counts(kv_heads, self.parallel.ulysses)[self.place.ulysses]
        row = 2 * kv_heads * self.sizes.head_dim
        forward: Messages = Counter()
        backward: Messages = Counter()
        hops, home = _hops(self.load.lengths, self.parallel.ring, self.place.ring)
        for (sent, received), count in hops.items():
            for message in _exchanged("ring", sent * row * self.width, received * row * self.width):
                forward[message] += count
        for (sent, received), count in (hops + home).items():
            for message in _exchanged("ring", sent * row * FP32, received * row * FP32):
                backward[message] += count
        return forward, forward + backward

    def between_stages(self) -> list[Message]:
        """c and x to the next stage, and their gradients back."""
        rows = self.place.held(self.load, self.parallel)
        values = [self.samples * self.sizes.condition_width * self.width, rows * self.sizes.dim * self.width]
        return [Message("pipeline", operation, size) for size in values for operation in (SEND, RECEIVE) if size]

    def announced(self) -> list[Message]:
        """DeepSpeed sends the shapes of what follows, where they may change."""
        first, last = self.place.blocks.start == 0, self.place.blocks.stop == self.sizes.n_layers
        operations = ([] if last else [SEND]) + ([] if first else [RECEIVE])
        return [Message("pipeline", operation, SHAPES_BYTES) for operation in operations]

    def learned(self) -> list[int]:
        """Bytes of the replicated parameters that work on tokens outside the blocks, of this stage."""
        sizes, sizes_of = self.sizes, []
        if self.place.blocks.start == 0:
            sizes_of += [sizes.dim * sizes.patch_size**2 * sizes.in_channels, sizes.dim]
            if sizes.text_conditional:
                sizes_of += [sizes.dim] * (1 + sizes.frames)
        if self.place.blocks.stop == sizes.n_layers:
            out = sizes.patch_size**2 * sizes.out_channels
            sizes_of += [out * sizes.dim, out]
        return [count * self.width for count in sizes_of]


@lru_cache(maxsize=4096)
def _hops(lengths: tuple[int, ...], ring: int, rank: int) -> tuple[Counter, Counter]:
    """How often a rank of a ring sends and receives so many rows at once: from step to step, and at last, home."""
    plan = schedule(lengths, ring)
    steps = range(1, len(plan.distances))
    last = [(plan.rows(rank, len(steps)), plan.rows(rank, 0))] if steps else []
    return Counter((plan.rows(rank, step - 1), plan.rows(rank, step)) for step in steps), Counter(last)


def _exchanged(axis: str, sent: int, received: int) -> list[Message]:
    """A message each way, of which an empty one is left out."""
    return [Message(axis, op, size) for op, size in ((SEND, sent), (RECEIVE, received)) if size]


def pass_messages(sizes: FlagDiTConfig, parallel: ParallelConfig, precision: str, load: Load, place: Place) -> Messages:
    """Of one forward pass over `load` and its backward pass, of the rank at `place`; exact."""
    one = _Pass(sizes, parallel, WIDTH[precision], load, place)
    found: Messages = Counter()
    blocks = len(place.blocks)

    def add(messages: Iterable[Message], times: int = 1) -> None:
        for message in messages:
            found[message] += times

    again = 2 if parallel.recompute != "none" else 1
    if parallel.tensor > 1:
        forward, backward = one.tensor()
        add(forward, blocks * again)
        add(backward, blocks)
        if place.blocks.stop == sizes.n_layers:
            forward, backward = one.modulated(2)
            add(forward)
            add(backward)
        if parallel.sequence:
            add(Message("tensor", ALL_REDUCE, size) for size in one.learned())
    if parallel.ulysses > 1:
        forward, backward = one.ulysses()
        add(forward, blocks * again)
        add(backward, blocks)
    if parallel.ring > 1:
        forward, backward = one.ring()
        for messages, times in ((forward, 2 if parallel.recompute == "full" else 1), (backward, 1)):
            for message, count in messages.items():
                found[message] += count * times * blocks
    if parallel.pipeline > 1:
        ends = (place.blocks.start > 0) + (place.blocks.stop < sizes.n_layers)
        add(one.between_stages(), ends)
        add(one.announced())
    return found


def gradient_messages(
    parallel: ParallelConfig, precision: str, elements: int, of_block: int, passes: int, shards: int
) -> Messages:
    """What DeepSpeed exchanges over data × ring × ulysses in a step: gradients in fp32, weights as they are.

    Bytes of each operation are those of real steps (tests/unit/test_plan_engine.py), but for ZeRO's padding; into how
    many calls they come is by the sizes of buckets alone, which end where a parameter does. Norms are not counted.

    Args:
        elements: trained, of this rank before ZeRO shards them; `of_block` of them those of a block.
        passes: micro-batches.
        shards: ranks that they are exchanged over.
    """
    if shards == 1:
        return Messages()
    width, zero = WIDTH[precision], parallel.zero_stage
    if zero == 0:
        return _in_calls(ALL_REDUCE, elements, ALL_REDUCED, FP32)
    if zero == 3:
        # What is gathered for the forward pass and still there, the backward pass does not gather again.
        gathered = elements + max(0, elements - GATHERED)
        of_pass = _in_calls(ALL_GATHER, gathered, max(FETCHED, of_block), width)
        of_pass += _in_calls(REDUCE_SCATTER, elements, REDUCE_BUCKET, FP32)
        return Counter({message: count * passes for message, count in of_pass.items()})
    summed = _in_calls(ALL_REDUCE, elements, REDUCE_BUCKET, FP32)
    times = passes if zero == 2 else 1
    return Counter({message: count * times for message, count in summed.items()}) + Counter(
        {Message("gradient", ALL_GATHER, width * elements): 1}
    )


def _in_calls(operation: str, elements: int, at_once: int, width: int) -> Messages:
    """So many elements, as many at once as there may be."""
    calls, rest = divmod(elements, at_once)
    whole = {Message("gradient", operation, width * at_once): calls} if calls else {}
    return Counter(whole) + Counter({Message("gradient", operation, width * rest): 1} if rest else {})
