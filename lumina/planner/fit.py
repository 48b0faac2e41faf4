"""The other way round: the longest sample, the largest model or the fewest devices that fit."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.planner.memory import MemoryPlan, activations_under_way, stage_parameters
from lumina.planner.search import Work, axes_of, smallest
from lumina.planner.traffic import FP32, WIDTH, Load, fullest_place

TOKEN_STEP = 1024
LARGEST_TOKENS = 2**27
HEAD = 128  # width of a head, and of the model for each of its blocks: the proportions of the 7B
LARGEST_DIM = 2**15
LARGEST_WORLD = 2**14
ANY_HOSTS, HOSTS_AT_ONCE = 1024, 16  # devices up to which every number of hosts is tried; and hosts at once beyond

Fit = tuple[ParallelConfig, MemoryPlan]


def fits(work: Work) -> Fit | None:
    """A layout that fits, and its memory; None where none does."""
    found = smallest(work)
    return found if found is not None and work.holds(found[1]) else None


def with_tokens(work: Work, tokens: int) -> Work:
    """The same with packs of one sample of so many tokens."""
    train = work.config.train.model_copy(update={"tokens_per_pack": tokens})
    config = work.config.model_copy(update={"train": train})
    return dataclasses.replace(work, config=config, load=Load((tokens,), work.load.captions[:1]))


def longest_sample(work: Work) -> tuple[int, Fit] | None:
    """Tokens of the longest sample, a multiple of 1,024, one to a pack; None where none up to 134,217,728 fits."""
    limit = LARGEST_TOKENS // TOKEN_STEP
    found = _furthest(lambda steps: fits(with_tokens(work, steps * TOKEN_STEP)), limit)
    return None if found is None else (found[0] * TOKEN_STEP, found[1])


def smallest_shape(kv_heads: int | None) -> dict[str, Any]:
    """Sizes of the smallest model that `largest_model` looks at, as settings of the section `model`.

    Raises:
        ValueError: for heads of keys and values that no model of the sizes that are tried has.
    """
    heads = kv_heads or 1
    if heads * HEAD > LARGEST_DIM:
        raise ValueError(
            f"model.n_kv_heads={heads}: models are tried up to a width of {LARGEST_DIM:,}, which has at most "
            f"{LARGEST_DIM // HEAD} heads"
        )
    return {"dim": heads * HEAD, "n_layers": heads, "n_heads": heads}


def shapes(sizes: FlagDiTConfig, layers: int | None = None) -> list[FlagDiTConfig]:
    """Models of heads of 128 and a block for every 128 of width, the narrowest first; `layers`: so many blocks in all.

    Heads of keys and values stay as `sizes` has them, and the other heads are a multiple of theirs.
    """
    unit = sizes.n_kv_heads or 1
    return [
        dataclasses.replace(sizes, dim=heads * HEAD, n_heads=heads, n_layers=layers or heads)
        for heads in range(unit, LARGEST_DIM // HEAD + 1, unit)
    ]


def largest_model(work: Work, layers: int | None = None) -> tuple[FlagDiTConfig, Fit] | None:
    """The largest of `shapes` of which a layout fits: all that could are looked at, the largest first.

    A larger one may fit where a smaller does not: heads and blocks decide what layouts there are.
    """
    models = shapes(work.sizes, layers)
    below, above = 0, len(models)
    while below < above:  # states grow with the model, whatever its layouts
        middle = (below + above) // 2
        if _states_fit(dataclasses.replace(work, sizes=models[middle])):
            below = middle + 1
        else:
            above = middle
    for sizes in reversed(models[:below]):
        if (found := _looked_up(dataclasses.replace(work, sizes=sizes))) is not None:
            return sizes, found
    return None


def on_devices(work: Work, world: int, *, a_pack_each: bool) -> Work:
    """The same on so many devices; with as many packs in a step, or as many as before."""
    if not a_pack_each:
        return dataclasses.replace(work, world=world)
    train = work.config.train.model_copy(update={"global_batch_packs": world})
    return dataclasses.replace(work, config=work.config.model_copy(update={"train": train}), packs=world, world=world)


def world_sizes(per_host: int) -> list[int]:
    """That are tried: any on one host, whole hosts up to 1,024 devices, then every 16 hosts up to 16,384 devices."""
    step = HOSTS_AT_ONCE * per_host
    few = [*range(1, per_host), *range(per_host, ANY_HOSTS + 1, per_host)]
    return [*few, *range(few[-1] // step * step + step, LARGEST_WORLD + 1, step)]


def fewest_devices(work: Work, *, a_pack_each: bool = False) -> tuple[int, Fit] | None:
    """The first of `world_sizes` that does, all before it looked at; None where none does.

    Args:
        a_pack_each: whether a step has as many packs as there are devices, or always those of `work`.
    """
    for world in world_sizes(work.speeds.per_host):
        if (found := _looked_up(on_devices(work, world, a_pack_each=a_pack_each))) is not None:
            return world, found
    return None


def _looked_up(work: Work) -> Fit | None:
    """As `fits`, after a look at what any layout takes at least."""
    return fits(work) if _states_fit(work) and _activations_fit(work) else None


def _whole(sizes: FlagDiTConfig) -> int:
    (one,) = stage_parameters(sizes, 1, 1)
    return sum(numel * count for numel, count in (*one.trained, *one.fixed))


def _states_fit(work: Work) -> bool:
    """Whether there is room for weights, moments and EMA, wherever a rank has its share, and for a whole model."""
    (one,) = stage_parameters(work.sizes, 1, 1)
    on_cpu = work.speeds.cores is not None
    share = (WIDTH[work.config.precision] + 3 * FP32) * one.elements / work.world
    room = work.memory if on_cpu else work.memory + work.host_memory
    return share <= room and FP32 * _whole(work.sizes) <= (work.memory if on_cpu else work.host_memory)


def _activations_fit(work: Work) -> bool:
    """Whether the first stage's activations of any layout fit, under the recomputation that leaves least of them."""
    config, sizes, fixed = work.config, work.sizes, work.fixed
    recompute = config.parallel.recompute if "recompute" in fixed else "full"
    offload = recompute == "full" and work.speeds.cores is None
    if "offload_activations" in fixed:
        offload = config.parallel.offload_activations
    names = ("tensor", "pipeline", "ring", "ulysses")
    held = [(number, getattr(config.parallel, name)) for number, name in enumerate(names) if name in fixed]
    for axes in axes_of(work.world, sizes.n_layers):
        tensor, pipeline, _, ulysses = axes
        if any(axes[number] != size for number, size in held) or ulysses > sizes.kv_heads // tensor:
            continue
        if sizes.kv_heads % tensor or sizes.n_heads % tensor or work.packs % (work.world // math.prod(axes)):
            continue
        for sequence in (False, True) if tensor > 1 else (False,):
            parallel = config.parallel.model_copy(
                update={
                    **dict(zip(names, axes, strict=True)),
                    "sequence": sequence,
                    "recompute": recompute,
                    "offload_activations": offload,
                }
            )
            if not work.allows(parallel, ["sequence"]):
                continue
            place = fullest_place(parallel, stage_parameters(sizes, tensor, pipeline)[0].blocks, 0)
            one = config.model_copy(update={"parallel": parallel})
            if activations_under_way(one, sizes, work.world, work.load, place).on_device <= work.memory:
                return True
    return False


def _furthest(attempt: Callable[[int], Fit | None], limit: int) -> tuple[int, Fit] | None:
    """The largest number at which an attempt that succeeds from somewhere on to somewhere on does, and what it gave."""
    low, best, high = 0, None, 1
    while high <= limit:
        found = attempt(high)
        if found is not None:
            low, best = high, found
        elif best is not None:
            break
        high *= 2
    high = min(high, limit + 1)
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(middle)) is not None:
            low, best = middle, found
        else:
            high = middle
    return None if best is None else (low, best)
