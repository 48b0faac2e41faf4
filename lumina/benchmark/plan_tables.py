"""What `lumina plan` prints of layouts: tables, settings, and the configuration that runs one."""

import dataclasses
from collections import Counter
from typing import Any

import yaml

from lumina.benchmark import record
from lumina.benchmark.plan_layouts import kind_of
from lumina.benchmark.plan_work import GIB
from lumina.config.devices import Device
from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flops import forward_flops
from lumina.planner.cost import StepTime
from lumina.planner.memory import MemoryPlan, stage_parameters
from lumina.planner.search import Candidate, Refused, Work


def settings(parallel: ParallelConfig) -> list[str]:
    """As ``key=value`` of a configuration, what differs from its defaults."""
    usual = ParallelConfig()
    found = [name for name in ParallelConfig.model_fields if getattr(parallel, name) != getattr(usual, name)]
    return [f"parallel.{name}={str(getattr(parallel, name)).lower()}" for name in found]


def layout_of(parallel: ParallelConfig, world: int) -> str:
    """In a few words."""
    axes = {name: getattr(parallel, name) for name in ("pipeline", "ring", "ulysses", "tensor")}
    data = world
    for size in axes.values():
        data //= size
    return " × ".join(f"{name} {size}" for name, size in {"data": data, **axes}.items() if size > 1) or "one device"


def model_flops(work: Work) -> int:
    """Of a step, forward and twice forward."""
    return 3 * forward_flops(work.sizes, work.load.lengths, work.load.captions).total * work.packs


def parameters_of(sizes: FlagDiTConfig) -> int:
    """All of a model, those too that are not trained."""
    stages = stage_parameters(sizes, 1, 1)
    return sum(numel * times for stage in stages for numel, times in (*stage.trained, *stage.fixed))


def heading(work: Work, device: Device) -> str:
    """Two lines: the model and a step of it, and the devices."""
    hosts, lengths = -(-work.world // work.speeds.per_host), work.load.lengths
    return (
        f"{parameters_of(work.sizes) / 1e9:,.2f}B parameters, {work.config.precision}; {len(lengths)} × {lengths[0]:,} "
        f"tokens a pack, {work.packs:,} packs a step ({work.packs * work.load.tokens:,} tokens)\n"
        f"{work.world:,} × {device.name} on {hosts:,} host{'s' * (hosts > 1)}; {room(work)}"
    )


def room(work: Work) -> str:
    """That there is to plan with."""
    if work.speeds.cores is not None:
        return f"{work.memory / GIB:,.1f} GiB of each to plan with"
    return f"{work.memory / GIB:,.1f} GiB of each and {work.host_memory / GIB:,.0f} GiB of its host to plan with"


def tables(work: Work, device: Device, layouts: list[Candidate], refused: list[Refused], top: int) -> list[str]:
    """Of the first `top` layouts each: those that fit, what they take, those that do not, those that cannot run."""
    fitting = [one for one in layouts if one.fits]
    found = []
    if fitting:
        found.append(
            f"{len(fitting)} of {len(layouts)} layouts fit; the fastest:\n\n{_fastest(work, device, fitting[:top])}"
        )
        found.append(f"memory of a device, GiB:\n\n{memory_table([one.memory for one in fitting[:top]])}")
        found.append(f"seconds of a step:\n\n{_time_table([one.time for one in fitting[:top]])}")
        best = fitting[0].parallel
        found.append("to run the first:\n\n" + snippet(work, best))
    else:
        found.append(f"none of {len(layouts)} layouts fits")
    if others := [one for one in layouts if not one.fits]:
        rows = [(layout_of(one.parallel, work.world), why(one.memory, work)) for one in others[:top]]
        found.append(
            f"{len(others)} do not fit, by their smallest variant:\n\n" + record.table(["layout", "why"], rows)
        )
    if refused:
        found.append(f"{len(refused)} cannot run, of which:\n\n{_refusals(refused, top)}")
    return found


def _fastest(work: Work, device: Device, layouts: list[Candidate]) -> str:
    peak = {"bf16": device.tflops, "fp32": device.tflops_fp32}[work.config.precision] * 1e12
    flops, tokens = model_flops(work), work.packs * work.load.tokens
    rows = []
    for number, one in enumerate(layouts, 1):
        seconds = one.time.total
        rows.append(
            (
                number,
                layout_of(one.parallel, work.world),
                f"{seconds:,.3g}",
                f"{tokens / seconds:,.0f}",
                f"{flops / seconds / work.world / peak:.1%}",
                f"{one.time.exposed:.1%}",
                f"{one.memory.on_device / GIB:,.1f}",
                " ".join(settings(one.parallel)) or "(defaults)",
            )
        )
    return record.table(["", "layout", "s", "tokens/s", "MFU", "waiting", "GiB", "settings"], rows)


def memory_table(plans: list[MemoryPlan]) -> str:
    """GiB, a row a plan."""
    names = ("weights", "gradients", "masters", "moments", "ema", "buffers", "activations", "on_host")
    rows = [
        (number, *(f"{getattr(one, name) / GIB:,.2f}" for name in (*names, "on_device")))
        for number, one in enumerate(plans, 1)
    ]
    return record.table(["", *(name.replace("_", " ") for name in names), "device"], rows)


def _time_table(times: list[StepTime]) -> str:
    names = [field.name for field in dataclasses.fields(StepTime)]
    rows = [(number, *(f"{getattr(one, name):,.3g}" for name in names)) for number, one in enumerate(times, 1)]
    return record.table(["", *names], rows)


def snippet(work: Work, parallel: ParallelConfig) -> str:
    """YAML of a configuration: model, precision, layout and packs; what has to be said of captions as a comment."""
    usual = ParallelConfig()
    changed = {name: value for name, value in parallel if value != getattr(usual, name)}
    tree: dict[str, Any] = {"model": work.config.model, "precision": work.config.precision}
    if changed:
        tree["parallel"] = changed
    tree["train"] = {"tokens_per_pack": work.load.tokens, "global_batch_packs": work.packs}
    lines = yaml.safe_dump(tree, sort_keys=False).splitlines()
    if work.load.captions:
        lines.append(
            f"# and a section text: max_tokens: {work.load.captions[0]}, features {work.sizes.cap_feat_dim:,} wide"
        )
    return "\n".join(f"    {line}" for line in lines)


def why(plan: MemoryPlan, work: Work) -> str:
    """It does not fit."""
    memory = work.memory
    if plan.on_device <= memory and work.speeds.cores is not None:
        return f"{plan.loading / GIB:,.1f} GiB to start with, of {memory / GIB:,.1f}"
    if plan.on_device <= memory:
        needed = max(plan.on_host, plan.loading) / GIB
        return f"{needed:,.1f} GiB of the host's memory for each device, of {work.host_memory / GIB:,.1f}"
    names = ("weights", "gradients", "masters", "moments", "ema", "buffers", "activations")
    most = sorted(names, key=lambda name: -getattr(plan, name))[:2]
    parts = " and ".join(f"{getattr(plan, name) / GIB:,.1f} of {name}" for name in most)
    return f"{plan.on_device / GIB:,.1f} GiB of {memory / GIB:,.1f}: {parts}"


def _refusals(refused: list[Refused], top: int) -> str:
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for one in refused:
        kind = kind_of(one.reason)
        kinds[kind] += 1
        example.setdefault(kind, one.reason)
    return record.table(["layouts", "why, as one of them"], [(n, example[kind]) for kind, n in kinds.most_common(top)])
