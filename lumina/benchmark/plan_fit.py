"""`lumina plan --fit`: the longest sample, the largest model, or the fewest devices that fit."""

import argparse
import dataclasses
import math

from lumina.benchmark.plan_layouts import layouts_of, why_none
from lumina.benchmark.plan_options import key_of, leaves
from lumina.benchmark.plan_tables import layout_of, memory_table, parameters_of, room, settings, snippet
from lumina.benchmark.plan_work import work_of
from lumina.config.devices import Device
from lumina.planner.fit import (
    ANY_HOSTS,
    HEAD,
    HOSTS_AT_ONCE,
    LARGEST_DIM,
    LARGEST_TOKENS,
    LARGEST_WORLD,
    Fit,
    fewest_devices,
    largest_model,
    longest_sample,
    on_devices,
    shapes,
    with_tokens,
    world_sizes,
)
from lumina.planner.search import Work

_LAID_OUT = 8  # numbers of devices after which it is clear that what is held fixed excludes all layouts


def fit(arguments: argparse.Namespace) -> str:
    """What is asked and what was found, with what it takes and the settings that run it.

    Raises:
        ValueError: for what does not fit together, or where nothing fits.
    """
    work, device = work_of(arguments)
    answer = {"tokens": _tokens, "model": _model, "devices": _devices}[arguments.fit]
    return answer(arguments, work, device)


def _tokens(_: argparse.Namespace, work: Work, device: Device) -> str:
    found = longest_sample(work)
    if found is None:
        _check_runs(with_tokens(work, LARGEST_TOKENS))
        raise ValueError(f"nothing fits: no sample of 1,024 tokens or more will do, with {room(work)}")
    tokens, (parallel, memory) = found
    limit = ", the longest that is tried" if tokens == LARGEST_TOKENS else ", in steps of 1,024"
    said = f"the longest sample: {tokens:,} tokens{limit}"
    asked = f"{_model_in_words(work)}; a sample a pack, {work.packs:,} packs a step"
    return _answer(f"{asked}\n{_devices_in_words(work, device)}", said, with_tokens(work, tokens), (parallel, memory))


def _model(arguments: argparse.Namespace, work: Work, device: Device) -> str:
    words = leaves(arguments.overrides)
    layers = work.sizes.n_layers if "model.n_layers" in map(key_of, words) else None
    tried = shapes(work.sizes, layers)
    found = largest_model(work, layers)
    if found is None:
        first = tried[0]
        _check_runs(*(dataclasses.replace(work, sizes=sizes) for sizes in (first, tried[min(32, len(tried)) - 1])))
        raise ValueError(
            f"nothing fits: not even a model of {first.n_layers} block{'s' * (first.n_layers > 1)} of width "
            f"{first.dim:,} will do, with {room(work)}"
        )
    sizes, fitting = found
    model = work.config.model | {"dim": sizes.dim, "n_layers": sizes.n_layers, "n_heads": sizes.n_heads}
    work = dataclasses.replace(work, sizes=sizes, config=work.config.model_copy(update={"model": model}))
    limit = ", the widest that is tried" if sizes.dim > LARGEST_DIM - tried[0].dim else ""
    said = f"the largest model: {parameters_of(sizes) / 1e9:,.2f}B parameters, {sizes.n_layers} blocks of width "
    said += f"{sizes.dim:,}{limit}"
    blocks = f"{layers} blocks" if layers else f"a block for every {HEAD} of width"
    heads = f" and {sizes.n_kv_heads} of keys and values" if sizes.n_kv_heads else ""
    asked = f"models of {blocks}, heads of {HEAD}{heads}, {work.config.precision}; {_load_in_words(work)}"
    return _answer(f"{asked}\n{_devices_in_words(work, device)}", said, work, fitting)


def _devices(arguments: argparse.Namespace, work: Work, device: Device) -> str:
    each = arguments.packs is None and "train.global_batch_packs" not in map(key_of, leaves(arguments.overrides))
    _check_runs(*(on_devices(work, world, a_pack_each=each) for world in _that_can_be_laid_out(work)))
    found = fewest_devices(work, a_pack_each=each)
    per_host = work.speeds.per_host
    counts = f"any number up to {per_host} on one host, whole hosts up to {ANY_HOSTS:,}, then every {HOSTS_AT_ONCE} "
    counts += f"hosts up to {LARGEST_WORLD:,} devices"
    if found is None:
        raise ValueError(f"nothing fits, of {counts}, with {room(work)}")
    world, fitting = found
    packs = "as many packs a step as devices" if each else f"{work.packs:,} packs a step"
    load = work.load
    asked = f"{_model_in_words(work)}; {len(load.lengths)} × {load.lengths[0]:,} tokens a pack, {packs}\n"
    asked += f"{device.name}: {counts}; {room(work)}"
    return _answer(asked, f"the fewest devices: {world:,}", on_devices(work, world, a_pack_each=each), fitting)


def _that_can_be_laid_out(work: Work) -> list[int]:
    """A few numbers of devices that what is held fixed of the axes divides; or one that it does not."""
    parallel, worlds = work.config.parallel, world_sizes(work.speeds.per_host)
    held = math.prod(
        getattr(parallel, name) for name in ("tensor", "pipeline", "ring", "ulysses") if name in work.fixed
    )
    return [world for world in worlds if world % held == 0][:_LAID_OUT] or worlds[-1:]


def _check_runs(*works: Work) -> None:
    """
    Raises:
        ValueError: where no layout of any of these can run, whatever it takes: why not, of the first that has any.
    """
    reasons = []
    for work in works:
        candidates, refused = layouts_of(work)
        if candidates:
            return
        reasons.append((not refused, why_none(work, refused)))
    raise ValueError(min(reasons, key=lambda reason: reason[0])[1])


def _model_in_words(work: Work) -> str:
    return f"{parameters_of(work.sizes) / 1e9:,.2f}B parameters, {work.config.precision}"


def _load_in_words(work: Work) -> str:
    lengths = work.load.lengths
    return f"{len(lengths)} × {lengths[0]:,} tokens a pack, {work.packs:,} packs a step"


def _devices_in_words(work: Work, device: Device) -> str:
    return f"{work.world:,} × {device.name}; {room(work)}"


def _answer(asked: str, said: str, work: Work, found: Fit) -> str:
    parallel, memory = found
    return (
        f"{asked}\n\n{said}, on {layout_of(parallel, work.world)}, {' '.join(settings(parallel)) or '(defaults)'}\n\n"
        f"{memory_table([memory])}\n\nto run it:\n\n{snippet(work, parallel)}"
    )
