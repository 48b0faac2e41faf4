"""The other way round: the longest sample, the largest model or the fewest devices that fit."""

import dataclasses
from collections.abc import Callable

from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.planner.memory import MemoryPlan
from lumina.planner.search import Work, smallest
from lumina.planner.traffic import Load

TOKEN_STEP = 1024
LARGEST_TOKENS = 2**27
HEAD = 128  # width of a head, and of the model for each of its blocks: the proportions of the 7B
LARGEST_DIM = 2**15
LARGEST_WORLD = 2**14

Fit = tuple[ParallelConfig, MemoryPlan]


def fits(work: Work) -> Fit | None:
    """A layout that fits, and its memory; None where none does."""
    found = smallest(work)
    return found if found is not None and work.holds(found[1]) else None


def longest_sample(work: Work) -> tuple[int, Fit] | None:
    """Tokens of the longest sample, a multiple of 1,024, one to a pack; None where not even 1,024 fit."""

    def of(steps: int) -> Work:
        tokens = steps * TOKEN_STEP
        captions = work.load.captions[:1]
        train = work.config.train.model_copy(update={"tokens_per_pack": tokens})
        config = work.config.model_copy(update={"train": train})
        return dataclasses.replace(work, config=config, load=Load((tokens,), captions))

    found = _furthest(lambda steps: fits(of(steps)), LARGEST_TOKENS // TOKEN_STEP)
    return None if found is None else (found[0] * TOKEN_STEP, found[1])


def largest_model(work: Work) -> tuple[FlagDiTConfig, Fit] | None:
    """Sizes of the largest model of the 7B's proportions: a block for every 128 of width, heads of 128."""

    def sizes(steps: int) -> FlagDiTConfig:
        return dataclasses.replace(work.sizes, dim=steps * HEAD, n_layers=steps, n_heads=steps, n_kv_heads=None)

    found = _furthest(lambda steps: fits(dataclasses.replace(work, sizes=sizes(steps))), LARGEST_DIM // HEAD)
    return None if found is None else (sizes(found[0]), found[1])


def fewest_devices(work: Work) -> tuple[int, Fit] | None:
    """A power of two, or a whole number of hosts; None where not even 16,384 do."""
    per_host = work.speeds.per_host
    counts = sorted({2**power for power in range(15)} | {per_host * hosts for hosts in (3, 5, 6, 7, 10, 12, 14)})
    for world in counts:
        if world <= LARGEST_WORLD and (found := fits(dataclasses.replace(work, world=world))):
            return world, found
    return None


def _furthest(attempt: Callable[[int], Fit | None], limit: int) -> tuple[int, Fit] | None:
    """The largest number at which an attempt that fails from somewhere on succeeds, and what it gave there."""
    low, best, high = 0, None, 1
    while high <= limit and (found := attempt(high)) is not None:
        low, best, high = high, found, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(middle)) is not None:
            low, best = middle, found
        else:
            high = middle
    return None if best is None else (low, best)
