"""Every layout of so many devices: what of it fits, and which is the fastest."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lumina.config.schema import Config, ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.parallel.layout import check_layout
from lumina.planner.cost import (
    Network,
    Part,
    Speeds,
    StepTime,
    moved_seconds,
    optimizer_seconds,
    pass_time,
    step_time,
)
from lumina.planner.memory import MemoryPlan, fullest_stage, stage_parameters
from lumina.planner.traffic import Load, fullest_place, gradient_messages

_AXES = ("tensor", "pipeline", "ring", "ulysses")
_OF_A_PASS = (*_AXES, "sequence", "recompute")
RESERVED = 2 * 2**30
"""Bytes of a device that are not ours to plan with: CUDA's context, NCCL's buffers, cuBLAS's workspace."""
FRAGMENTED = 0.05
"""Share of the rest that torch's allocator is taken to lose."""


@dataclass(frozen=True)
class Work:
    """What is to be trained, on what.

    load: of a pack.
    packs: in a step, over all devices.
    memory: bytes of a device that a plan may use; `usable` gives them.
    host_memory: bytes of its host's memory that each device may use.
    fixed: names of settings of the configuration's section `parallel` that every layout has.
    """

    config: Config
    sizes: FlagDiTConfig
    load: Load
    packs: int
    world: int
    memory: float
    host_memory: float
    speeds: Speeds
    fixed: frozenset[str] = frozenset()

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether a device and its share of the host have room for it."""
        if self.speeds.cores is not None:  # it is the same memory
            return max(plan.on_device, plan.loading) <= self.memory
        return plan.on_device <= self.memory and max(plan.on_host, plan.loading) <= self.host_memory

    def allows(self, parallel: ParallelConfig, names: Iterable[str] | None = None) -> bool:
        """Whether a layout has what is fixed, of all settings or of these."""
        looked_at = self.fixed if names is None else self.fixed.intersection(names)
        return all(getattr(parallel, name) == getattr(self.config.parallel, name) for name in looked_at)


@dataclass(frozen=True)
class Candidate:
    """A layout with all that goes with it; `memory` of its fullest stage."""

    work: Work
    parallel: ParallelConfig
    memory: MemoryPlan
    fits: bool

    @cached_property
    def time(self) -> StepTime:
        """Of a step; reckoned when it is first asked for."""
        return time_of(self.work, self.parallel)

    @property
    def axes(self) -> tuple[int, int, int, int]:
        parallel = self.parallel
        return parallel.tensor, parallel.pipeline, parallel.ring, parallel.ulysses


@dataclass(frozen=True)
class Refused:
    """Axes of a layout that cannot run at all, and why."""

    axes: tuple[int, int, int, int]
    reason: str


def usable(memory: int, reserved: int = RESERVED) -> float:
    """Of a device's bytes, those that a plan may use; on a CPU there is nothing to reserve."""
    return (memory - reserved) * (1 - FRAGMENTED)


def search(work: Work) -> tuple[list[Candidate], list[Refused]]:
    """Variants of all layouts, the fastest that fits first; and what is refused.

    Of variants that fit and differ in what is computed again or waits on the host, there is the one that keeps most:
    the others take longer.
    """
    found: list[Candidate] = []
    refused: list[Refused] = []
    for axes, reason in _axes_looked_at(work):
        if reason is not None:
            refused.append(Refused(axes, reason))
        else:
            found += _looked_at(work, axes)
    found.sort(key=lambda one: (not one.fits, one.time.total if one.fits else one.memory.on_device))
    return found, refused


def _looked_at(work: Work, axes: tuple[int, int, int, int]) -> Iterator[Candidate]:
    """Variants of a layout, but those of which a faster one is known to fit."""
    settled = set()
    for parallel in variants(work, axes):
        kind = parallel.sequence, parallel.zero_stage, parallel.offload_optimizer
        if kind not in settled:
            one = candidate(work, parallel)
            if one.fits:
                settled.add(kind)
            yield one


def best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """Of each layout the first: its fastest that fits or, where none does, the smallest."""
    firsts: dict[tuple[int, int, int, int], Candidate] = {}
    for one in candidates:
        firsts.setdefault(one.axes, one)
    return list(firsts.values())


def axes_of(world: int, layers: int) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, pipeline, ring, ulysses) whose product divides `world`."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    for tensor in sizes:
        for pipeline in sizes:
            if pipeline > layers or world % (tensor * pipeline):
                continue
            for ring in sizes:
                for ulysses in sizes:
                    if world % (tensor * pipeline * ring * ulysses) == 0:
                        yield tensor, pipeline, ring, ulysses


def _axes_looked_at(work: Work) -> Iterator[tuple[tuple[int, int, int, int], str | None]]:
    """All that have what is fixed; with the reason where a layout of theirs cannot run."""
    for axes in axes_of(work.world, work.sizes.n_layers):
        parallel = _with(work.config, axes)
        if work.allows(parallel, _AXES):
            try:
                _check(work, parallel)
            except ValueError as error:
                yield axes, str(error)
            else:
                yield axes, None


def variants(work: Work, axes: tuple[int, int, int, int]) -> Iterator[ParallelConfig]:
    """All else that a layout leaves open, but what is fixed; of those that keep more or less, the fastest first."""
    return filter(work.allows, _variants(work.config, axes, offload=work.speeds.cores is None))


def _variants(config: Config, axes: tuple[int, int, int, int], *, offload: bool) -> Iterator[ParallelConfig]:
    """`offload`: whether a host has memory beside that of its devices."""
    first = _with(config, axes)
    for sequence in (False, True) if axes[0] > 1 else (False,):
        for zero in (0, 1, 2, 3):
            if (zero == 0 and config.precision == "bf16") or (zero > 1 and axes[1] > 1):
                continue
            for recompute, offloads in (("none", False), ("selective", False), ("full", False), ("full", True)):
                if offloads and not offload:
                    continue
                for offload_optimizer in (False, True) if zero and offload else (False,):
                    yield first.model_copy(
                        update={
                            "sequence": sequence,
                            "zero_stage": zero,
                            "recompute": recompute,
                            "offload_activations": offloads,
                            "offload_optimizer": offload_optimizer,
                        }
                    )


def candidate(work: Work, parallel: ParallelConfig) -> Candidate:
    """A layout, and whether it fits."""
    memory = memory_of(work, parallel)
    return Candidate(work, parallel, memory, work.holds(memory))


def memory_of(work: Work, parallel: ParallelConfig) -> MemoryPlan:
    """Of the fullest stage."""
    config = work.config.model_copy(update={"parallel": parallel})
    return fullest_stage(config, work.sizes, work.world, work.load, on_cpu=work.speeds.cores is not None)


def smallest(work: Work) -> tuple[ParallelConfig, MemoryPlan] | None:
    """The layout that takes least of a device, of those that fit if any does; None where none can run."""
    found: list[tuple[bool, int, ParallelConfig, MemoryPlan]] = []
    for axes, reason in _axes_looked_at(work):
        for parallel in variants(work, axes) if reason is None else ():
            memory = memory_of(work, parallel)
            found.append((not work.holds(memory), memory.on_device, parallel, memory))
    return min(found, key=lambda one: one[:2])[2:] if found else None


def time_of(work: Work, parallel: ParallelConfig) -> StepTime:
    """Of a step."""
    sizes, speeds, precision = work.sizes, work.speeds, work.config.precision
    stages = stage_parameters(sizes, parallel.tensor, parallel.pipeline)
    # Sharding changes neither what a pass computes nor what it sends along the other axes.
    key = tuple((name, getattr(parallel, name)) for name in _OF_A_PASS)
    kinds = {len(stage.blocks) for stage in stages}
    parts = [
        _part(sizes, key, precision, work.load, stage.blocks, number, work.world, speeds)
        for number, stage in enumerate(stages)
        if len(kinds) > 1 or number in (0, len(stages) - 1) or number == 1
    ]
    if len(parts) < len(stages):
        parts[1:1] = [parts[1]] * (len(stages) - len(parts))
    if parallel.offload_activations:
        moved = moved_seconds(
            sizes, parallel, precision, work.load, fullest_place(parallel, stages[0].blocks, 0), speeds
        )
        parts = [dataclasses.replace(part, recompute=part.recompute + moved) for part in parts]
    data = work.world // (parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses)
    passes = work.packs // data
    fullest = max(stages, key=lambda stage: stage.elements)
    network = Network(parallel, work.world, speeds)
    shards = network.ranks("gradient")
    share = fullest.elements if parallel.zero_stage == 0 else -(-fullest.elements // shards)
    exchanged = gradient_messages(parallel, precision, fullest.elements, fullest.of_block, passes, shards)
    gradients = network.of_axis(exchanged, "gradient")
    here = min(work.world, speeds.per_host)
    shared = 1.0 if speeds.cores is None else max(1.0, here / speeds.cores)
    return step_time(parts, passes, gradients, optimizer_seconds(parallel, precision, share, speeds), shared)


@lru_cache(maxsize=100_000)
def _part(
    sizes: FlagDiTConfig,
    parallel: tuple,
    precision: str,
    load: Load,
    blocks: range,
    stage: int,
    world: int,
    speeds: Speeds,
) -> Part:
    settings = ParallelConfig.model_construct(**dict(parallel))
    return pass_time(sizes, settings, precision, load, fullest_place(settings, blocks, stage), world, speeds)


def _with(config: Config, axes: tuple[int, int, int, int]) -> ParallelConfig:
    return config.parallel.model_copy(update=dict(zip(_AXES, axes, strict=True)) | {"sequence": False})


def _check(work: Work, parallel: ParallelConfig) -> None:
    """
    Raises:
        ValueError: for a layout that cannot run.
    """
    settings = parallel.model_copy(
        update={"zero_stage": 1, "recompute": "none", "offload_activations": False, "offload_optimizer": False}
    )
    check_layout(work.config.model_copy(update={"parallel": settings}), work.sizes, work.world)
    ranks = parallel.ring * parallel.ulysses * (parallel.tensor if parallel.sequence else 1)
    if ranks > work.load.tokens:
        raise ValueError(f"a pack of {work.load.tokens:,} tokens leaves some of its {ranks:,} ranks without any")
