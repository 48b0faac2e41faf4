"""What a step takes, by a roofline: products at the rate that is reached, bytes at the bandwidth, messages at the link.

Every figure is of the slowest rank. What runs at once is taken as the longer of the two, and that is the ring's
messages beside its attention alone: DeepSpeed is told to overlap nothing, and all other messages are waited for.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

from lumina.config.devices import Device
from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flops import forward_flops
from lumina.parallel.cuts import kv_head_counts
from lumina.parallel.schedule import schedule
from lumina.planner.activations import activations
from lumina.planner.messages import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, RECEIVE, REDUCE_SCATTER, Messages
from lumina.planner.traffic import FP32, WIDTH, Load, Place, pass_messages

REACHED_OF_NETWORK = 0.85
FLASH_BACKWARD = 2.5
"""What flash attention computes backward, in forward passes."""


@dataclass(frozen=True)
class Speeds:
    """What is reached, by one rank.

    gemm, attention_forward, attention_backward: FLOP/s.
    bandwidth: bytes a second of its memory; host: to and from the host's.
    link, network: bytes a second that it sends within its host, and to others.
    latency: seconds of a message beyond its bytes, of each turn that a collective takes.
    overhead: seconds of launching what a block computes, forward.
    per_host: ranks of a host.
    cores: ranks of a host that compute at once at this speed; the others wait, and what messages take is taken from
        computing. None: all.
    """

    gemm: float
    attention_forward: float
    attention_backward: float
    bandwidth: float
    host: float
    link: float
    network: float
    latency: float
    overhead: float
    per_host: int
    cores: int | None = None

    @staticmethod
    def of(device: Device, precision: str, per_host: int) -> "Speeds":
        """Of a GPU by its data sheet, less what is measured to be lost (docs/plan.md has the sources)."""
        peak = {"bf16": device.tflops, "fp32": device.tflops_fp32}[precision] * 1e12
        return Speeds(
            gemm=0.80 * peak,
            attention_forward=0.61 * peak,
            attention_backward=0.52 * peak,
            bandwidth=0.90 * device.bandwidth,
            host=0.80 * device.host,
            link=0.80 * device.link,
            network=REACHED_OF_NETWORK * device.network,
            latency=20e-6,
            overhead=50e-6,
            per_host=per_host,
        )


@dataclass(frozen=True)
class Part:
    """Seconds of one forward pass and its backward pass, on one rank; `total` is their sum.

    recompute: what the backward pass computes again, its messages apart, and what waits on the host going and coming.
    tensor, ring, ulysses, stages: messages that are waited for.
    """

    gemm: float
    attention: float
    elementwise: float
    recompute: float
    tensor: float
    ring: float
    ulysses: float
    stages: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepTime(Part):
    """Seconds of a step: those of its passes, and what is beside them.

    bubble: of the pipeline.
    gradients: sums of gradients, and gathers of weights under ZeRO.
    optimizer: update of weights, moments and EMA.
    """

    bubble: float
    gradients: float
    optimizer: float

    @property
    def exposed(self) -> float:
        """Share that ranks wait for each other."""
        return 1 - (self.gemm + self.attention + self.elementwise + self.recompute + self.optimizer) / self.total


def strides(parallel: ParallelConfig, world: int) -> dict[str, tuple[int, int]]:
    """Of each axis, how far apart in world ranks its neighbours are, and how many it has."""
    data = world // (parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses)
    found, stride = {}, 1
    sizes = (parallel.tensor, parallel.ulysses, parallel.ring, data, parallel.pipeline)
    for name, size in zip(("tensor", "ulysses", "ring", "data", "pipeline"), sizes, strict=True):
        found[name] = stride, size
        stride *= size
    found["gradient"] = parallel.tensor, parallel.ulysses * parallel.ring * data
    return found


class Network:
    """Seconds of messages on the axes of a layout."""

    def __init__(self, parallel: ParallelConfig, world: int, speeds: Speeds):
        self._speeds, self._strides, self._world = speeds, strides(parallel, world), world

    def ranks(self, axis: str) -> int:
        return self._strides[axis][1]

    def bandwidth(self, axis: str, in_turn: bool = False) -> float:
        """Of a collective, bytes a second of each rank; `in_turn`: of messages from each rank to the next.

        Ranks of one host that are in the same collective use the network ports of all of them.
        """
        stride, size = self._strides[axis]
        speeds = self._speeds
        if self._within_hosts(axis):
            return speeds.link
        together = 1 if in_turn else max(1, min(size, speeds.per_host // stride))
        return min(speeds.link, together * speeds.network)

    def _within_hosts(self, axis: str) -> bool:
        """Whether none of the axis's groups is on two hosts: also one that starts within the first may end there."""
        stride, size = self._strides[axis]
        return self._world <= self._speeds.per_host or self._speeds.per_host % (stride * size) == 0

    def seconds(self, axis: str, operation: str, size: float | int) -> float:
        """Of one message of `size` bytes, as `messages.Message` counts them."""
        stride, ranks = self._strides[axis]
        speeds = self._speeds
        if operation == ALL_TO_ALL and not self._within_hosts(axis):
            # Each rank sends its own part through its own port; what stays on the host goes beside it.
            here = max(1, min(ranks, speeds.per_host // stride))
            leaves, stays = (ranks - here) / ranks * size, (here - 1) / ranks * size
            return max(leaves / speeds.network, stays / speeds.link) + self.latency(axis, operation)
        share = (ranks - 1) / ranks
        factor = {ALL_REDUCE: 2 * share, ALL_GATHER: share, REDUCE_SCATTER: share, ALL_TO_ALL: share}.get(operation)
        if factor is None:  # to one neighbour
            return size / self.bandwidth(axis, in_turn=True) + speeds.latency
        return factor * size / self.bandwidth(axis) + self.latency(axis, operation)

    def latency(self, axis: str, operation: str) -> float:
        """Of a collective: NCCL's by trees, gloo's from each rank to the next."""
        ranks = self._strides[axis][1]
        # gloo reduces and scatters by an all-reduce.
        turns = (2 if operation in (ALL_REDUCE, REDUCE_SCATTER) else 1) * (ranks - 1)
        return self._speeds.latency * max(1.0, math.log2(ranks) if self._speeds.cores is None else turns)

    def of_axis(self, messages: Messages, axis: str) -> float:
        """All of an axis, one after another; what is received comes while something is sent."""
        return sum(
            (
                count * self.seconds(message.axis, message.operation, message.bytes)
                for message, count in messages.items()
                if message.axis == axis and message.operation != RECEIVE
            ),
            0.0,
        )


def pass_time(
    sizes: FlagDiTConfig,
    parallel: ParallelConfig,
    precision: str,
    load: Load,
    place: Place,
    world: int,
    speeds: Speeds,
) -> Part:
    """Of the rank at `place`."""
    width, blocks = WIDTH[precision], len(place.blocks)
    network = Network(parallel, world, speeds)
    messages = pass_messages(sizes, parallel, precision, load, place)
    tokens, held = place.tokens(load, parallel), place.held(load, parallel)
    flops = _flops(sizes, load)
    # Products on tokens are shared by all ranks of a pack; those with captions and times by its tensor ranks alone.
    share = tokens / load.tokens
    gemm = blocks * (flops.on_tokens * share + flops.on_samples) / parallel.tensor
    attention = blocks * flops.attention * _share_of_scores(load.lengths, parallel.ring, place.ring)
    attention /= parallel.tensor
    if parallel.ulysses > 1:
        kv_heads = sizes.kv_heads // parallel.tensor
        attention *= kv_head_counts(kv_heads, parallel.ulysses)[place.ulysses] / kv_heads
    attention += blocks * flops.text * share / parallel.tensor
    rows = 5 * held + (8 * tokens / parallel.tensor if sizes.qk_norm else 4 * tokens / parallel.tensor)
    touched = blocks * (rows * sizes.dim + 5 * tokens * sizes.ffn_dim / parallel.tensor + 4 * held * sizes.dim) * width
    forward = {
        "gemm": gemm / speeds.gemm,
        "attention": attention / speeds.attention_forward,
        "elementwise": touched / speeds.bandwidth + blocks * speeds.overhead,
    }
    again = {"none": (), "selective": ("gemm", "elementwise"), "full": tuple(forward)}[parallel.recompute]
    attention_back = FLASH_BACKWARD * attention / speeds.attention_backward
    runs = forward["attention"] * (2 if parallel.recompute == "full" else 1) + attention_back
    ring = 0.0
    if parallel.ring > 1:
        ring = network.of_axis(messages, "ring")
        if speeds.cores is None:  # a block of keys travels while another is worked on
            ring = max(0.0, ring - runs * (1 - 1 / parallel.ring))
    return Part(
        gemm=3 * forward["gemm"],
        attention=forward["attention"] + attention_back,
        elementwise=3 * forward["elementwise"],
        recompute=sum((forward[name] for name in again), 0.0),
        tensor=network.of_axis(messages, "tensor"),
        ring=ring,
        ulysses=network.of_axis(messages, "ulysses"),
        stages=network.of_axis(messages, "pipeline"),
    )


def moved_seconds(
    sizes: FlagDiTConfig, parallel: ParallelConfig, precision: str, load: Load, place: Place, speeds: Speeds
) -> float:
    """For what waits on the host between forward and backward, there and back."""
    if not parallel.offload_activations:
        return 0.0
    return 2 * activations(sizes, parallel, precision, load, place).in_blocks / speeds.host


@dataclass(frozen=True)
class _BlockFlops:
    """Of a block, forward: products on tokens, products on samples and captions, self-attention, text attention."""

    on_tokens: int
    on_samples: int
    attention: int
    text: int


@lru_cache(maxsize=64)
def _flops(sizes: FlagDiTConfig, load: Load) -> _BlockFlops:
    one = dataclasses.replace(sizes, n_layers=1)
    whole = forward_flops(one, load.lengths, load.captions)
    on_tokens = 2 * sizes.dim * (2 * sizes.dim + 2 * sizes.kv_heads * sizes.head_dim) + 6 * sizes.dim * sizes.ffn_dim
    on_tokens *= load.tokens
    alone = sum(4 * length * length * sizes.dim for length in load.lengths)
    return _BlockFlops(on_tokens, whole.in_blocks - on_tokens, alone, whole.attention - alone)


@lru_cache(maxsize=1024)
def _share_of_scores(lengths: tuple[int, ...], ring: int, rank: int) -> float:
    """Of all pairs of tokens that meet in a pack, those that a rank of a ring works on."""
    if ring == 1:
        return 1.0
    works = [work for work in schedule(lengths, ring).work(rank) if work is not None]
    meetings = [meeting for work in works for meeting in work.meetings]
    met = sum((m.q_stop - m.q_start) * (m.k_stop - m.k_start) for m in meetings)
    return met / sum(length * length for length in lengths)


def step_time(parts: list[Part], passes: int, gradients: float, optimizer: float, shared: float = 1.0) -> StepTime:
    """Of `passes` micro-batches through stages that take `parts` each.

    Args:
        gradients, optimizer: seconds once a step, and what ZeRO adds to each pass in the former.
        shared: ranks that take turns on each core; then a stage that waits leaves its core to others.
    """
    slowest = max(parts, key=lambda part: part.total)
    busy = passes * slowest.total
    last = busy + sum(part.total for part in parts) - slowest.total  # the first micro-batch in, the last one out
    if shared > 1:
        worked = passes * sum(part.total for part in parts) / len(parts) * shared
        last = max(last, worked)
        scale, bubble = worked / busy, last - worked
    else:
        scale, bubble = 1.0, last - busy
    terms = {name: seconds * passes * scale for name, seconds in vars(slowest).items()}
    return StepTime(**terms, bubble=bubble, gradients=gradients * shared, optimizer=optimizer * shared)


def optimizer_seconds(parallel: ParallelConfig, precision: str, share: int, speeds: Speeds) -> float:
    """Reads and writes of gradients (for the norm, too), masters, moments, EMA and working weights, once each."""
    moved = share * (2 * FP32 + 2 * FP32 + 4 * FP32 + 2 * FP32 + WIDTH[precision])
    if parallel.offload_optimizer:
        # Gradients out, weights back, and the arithmetic on the host, whose memory all its ranks share.
        return share * (FP32 + WIDTH[precision]) / speeds.host + moved / speeds.host
    return moved / speeds.bandwidth
