"""`lumina plan`: what the planner finds, as tables; and its check by simulation."""

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina.benchmark import record
from lumina.config.devices import DEVICES, Device
from lumina.config.load import with_overrides
from lumina.config.schema import ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flops import forward_flops
from lumina.model.presets import PRESETS
from lumina.planner.cost import REACHED_OF_NETWORK, Speeds, StepTime
from lumina.planner.fit import fewest_devices, largest_model, longest_sample
from lumina.planner.memory import MemoryPlan, activations_under_way, place_of, stage_parameters
from lumina.planner.messages import total_bytes
from lumina.planner.search import Candidate, Refused, Work, best_of_each, search, usable
from lumina.planner.traffic import Load, pass_messages

STEP_TOKENS = 4 * 2**20
PER_HOST = 8
GIB = 2**30
_LARGEST_WORLD = 16_384


def plan(arguments: argparse.Namespace) -> None:
    """The verb."""
    record.check_writable(arguments.out)
    _check_modes(arguments)
    if arguments.measured is not None:
        from lumina.benchmark.plan_measured import beside

        print(beside(arguments))
        return
    if arguments.scaling is not None:
        from lumina.benchmark.plan_scaling import scaling

        work, device = work_of(arguments)
        print(f"{_heading(work, device)}\n\n{scaling(arguments)}")
        return
    work, device = work_of(arguments)
    if arguments.fit is not None:
        _fit(arguments, work, device)
        return
    candidates, refused = search(work)
    layouts = best_of_each(candidates)
    if not layouts:
        raise ValueError(_nothing(refused))
    content = _content(arguments, work, device, layouts, refused)
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(content))
        return
    print(_heading(work, device))
    print("\n" + "\n\n".join(_tables(work, device, layouts, refused, arguments.top)))
    if arguments.simulate and not any(one.fits for one in layouts):
        print("\nnothing fits that could be simulated")
    elif arguments.simulate:
        print("\n" + checked(arguments, work, [one for one in layouts if one.fits][: arguments.simulate]))


def _check_modes(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for options of which one would not be heeded.
    """
    modes = [name for name in ("measured", "scaling", "fit") if getattr(arguments, name) is not None]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} ask for different things: give one of them")
    if modes and (arguments.simulate or arguments.json or arguments.out):
        raise ValueError(f"--{modes[0]} prints one answer: it goes with none of --simulate, --json and --out")
    if arguments.simulate and arguments.json:
        raise ValueError("--simulate prints a table: it does not go with --json")


def work_of(arguments: argparse.Namespace) -> tuple[Work, Device]:
    """What is asked.

    Raises:
        ValueError: for what does not fit together.
    """
    for name in ("tokens", "samples", "gpus", "top"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    for name in ("packs", "nodes", "memory", "host_memory", "interconnect"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, not {value}")
    for name in ("text_tokens", "simulate"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(arguments, name)}")
    if arguments.gpus > _LARGEST_WORLD:
        raise ValueError(f"--gpus {arguments.gpus}: plans are made for at most {_LARGEST_WORLD:,} devices")
    if arguments.model not in PRESETS:
        raise ValueError(f"--model {arguments.model} is not one of {', '.join(PRESETS)}; key=value changes its sizes")
    per_host = _per_host(arguments.gpus, arguments.nodes)
    conditions = {"cap_feat_dim": 4096} if arguments.text_tokens else {"num_classes": 1000}
    pack = arguments.tokens * arguments.samples
    packs = arguments.packs or (arguments.gpus if arguments.fit else _shared(STEP_TOKENS // pack, arguments.gpus))
    tree: dict[str, Any] = {
        "run": {"dir": "none"},
        "model": {"preset": arguments.model, "in_channels": 4} | conditions,
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "ema_decay": 0.9999, "tokens_per_pack": pack, "global_batch_packs": packs},
        "precision": arguments.dtype,
    }
    config = with_overrides(tree, arguments.overrides, "plan")
    sizes = FlagDiTConfig.from_dict(config.model)
    if sizes.text_conditional != bool(arguments.text_tokens):
        raise ValueError("--text-tokens 0 plans a label-conditional model: set model.num_classes, or give some")
    if config.train.packs_per_forward != 1:
        raise ValueError("train.packs_per_forward is not planned with: give the samples of a pass as --samples")
    words = [word.partition("=")[0] for word in arguments.overrides]
    fixed = frozenset(word.removeprefix("parallel.") for word in words if word.startswith("parallel."))
    device, speeds = _speeds(arguments, config.precision, per_host)
    captions = (arguments.text_tokens,) * arguments.samples if arguments.text_tokens else ()
    load = Load((arguments.tokens,) * arguments.samples, captions)
    packs = config.train.global_batch_packs
    room = usable(device.memory), arguments.host_memory * GIB
    if room[0] <= 0:
        raise ValueError(f"a device of {device.memory / GIB:,.1f} GiB has nothing to plan with: 2 go to CUDA and NCCL")
    return Work(config, sizes, load, packs, arguments.gpus, *room, speeds, fixed), device


def _shared(packs: int, world: int) -> int:
    """About so many packs, that as many ranks can share as may be."""
    if packs >= world:
        return packs // world * world
    return max(size for size in range(1, max(1, packs) + 1) if world % size == 0)


def _per_host(world: int, hosts: int | None) -> int:
    if hosts is None:
        return min(world, PER_HOST)
    if world % hosts:
        raise ValueError(f"--gpus {world} cannot be shared evenly by --nodes {hosts}")
    return world // hosts


def _speeds(arguments: argparse.Namespace, precision: str, per_host: int) -> tuple[Device, Speeds]:
    within = between = None
    if arguments.network is not None:
        within, between = _measured_network(Path(arguments.network))
    if arguments.device == "here":
        from lumina.benchmark.rates import here

        device, speeds = here(precision, per_host)
    elif arguments.device in DEVICES:
        device = DEVICES[arguments.device]
        speeds = Speeds.of(device, precision, per_host)
    else:
        raise ValueError(f"--device {arguments.device} is not one of {', '.join(DEVICES)}, or `here`")
    if arguments.interconnect is not None:
        between = arguments.interconnect * 1e9 * REACHED_OF_NETWORK
    if arguments.memory is not None:
        device = dataclasses.replace(device, memory=int(arguments.memory * GIB))
    if within is not None:
        speeds = dataclasses.replace(speeds, link=within)
        if speeds.cores is not None:  # ranks of one machine have no other network
            speeds = dataclasses.replace(speeds, network=within)
    return device, speeds if between is None else dataclasses.replace(speeds, network=between)


def _measured_network(path: Path) -> tuple[float | None, float | None]:
    """Bytes a second within hosts and between them, the slowest of each, as `lumina benchmark network` wrote them."""
    from lumina.benchmark.network import LINK, WITHIN

    try:
        rows = json.loads(path.read_text())["rows"]
        found = {kind: [row["bandwidth"] for row in rows if row["what"] == kind] for kind in (WITHIN, LINK)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--network {path} is no record of `lumina benchmark network --out` ({error})") from error
    within, between = (min(found[kind], default=None) for kind in (WITHIN, LINK))
    if within is None and between is None:
        raise ValueError(f"--network {path} holds no measurement within a host or between two")
    return within, between


def _nothing(refused: list[Refused]) -> str:
    reason = refused[0].reason if refused else "what is held fixed does not divide the devices"
    return f"no layout of these devices can run; the first of {len(refused)} reasons: {reason}"


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


def _heading(work: Work, device: Device) -> str:
    sizes, load = work.sizes, work.load
    whole = sum(stage.elements for stage in stage_parameters(sizes, 1, 1))
    hosts = -(-work.world // work.speeds.per_host)
    return (
        f"{whole / 1e9:,.2f}B parameters, {work.config.precision}; {len(load.lengths)} × {load.lengths[0]:,} tokens a "
        f"pack, {work.packs} packs a step ({work.packs * load.tokens:,} tokens)\n"
        f"{work.world:,} × {device.name} on {hosts:,} host{'s' * (hosts > 1)}; {work.memory / GIB:,.1f} GiB of each "
        f"and {work.host_memory / GIB:,.0f} GiB of its host to plan with"
    )


def _tables(work: Work, device: Device, layouts: list[Candidate], refused: list[Refused], top: int) -> list[str]:
    fitting = [one for one in layouts if one.fits]
    tables = []
    if fitting:
        tables.append(
            f"{len(fitting)} of {len(layouts)} layouts fit; the fastest:\n\n{_fastest(work, device, fitting[:top])}"
        )
        tables.append(f"memory of a device, GiB:\n\n{_memory_table([one.memory for one in fitting[:top]])}")
        tables.append(f"seconds of a step:\n\n{_time_table([one.time for one in fitting[:top]])}")
        best = fitting[0].parallel
        tables.append("to run the first:\n\n" + snippet(work, best))
    else:
        tables.append(f"none of {len(layouts)} layouts fits")
    if others := [one for one in layouts if not one.fits]:
        rows = [(layout_of(one.parallel, work.world), _why(one.memory, work)) for one in others[:top]]
        tables.append(
            f"{len(others)} do not fit, by their smallest variant:\n\n" + record.table(["layout", "why"], rows)
        )
    if refused:
        tables.append(f"{len(refused)} cannot run, of which:\n\n{_refusals(refused, top)}")
    return tables


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


def _memory_table(plans: list[MemoryPlan]) -> str:
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
    """YAML of a configuration."""
    given = [setting.removeprefix("parallel.").replace("=", ": ") for setting in settings(parallel)]
    lines = [f"precision: {work.config.precision}"]
    if given:
        lines += ["parallel:", *(f"  {line}" for line in given)]
    lines += ["train:", f"  tokens_per_pack: {work.load.tokens}", f"  global_batch_packs: {work.packs}"]
    return "\n".join(f"    {line}" for line in lines)


def _why(plan: MemoryPlan, work: Work) -> str:
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
        kind = "".join(character for character in one.reason if not character.isdigit())[:40]
        kinds[kind] += 1
        example.setdefault(kind, one.reason)
    return record.table(["layouts", "why, as one of them"], [(n, example[kind]) for kind, n in kinds.most_common(top)])


def _content(
    arguments: argparse.Namespace, work: Work, device: Device, layouts: list[Candidate], refused: list[Refused]
) -> dict[str, Any]:
    flops = model_flops(work)
    return {
        "model": arguments.model,
        "sizes": dataclasses.asdict(work.sizes),
        "tokens": list(work.load.lengths),
        "packs": work.packs,
        "world": work.world,
        "device": dataclasses.asdict(device),
        "speeds": dataclasses.asdict(work.speeds),
        "memory": work.memory,
        "host_memory": work.host_memory,
        "layouts": [
            {
                "layout": layout_of(one.parallel, work.world),
                "settings": settings(one.parallel),
                "fits": one.fits,
                "seconds": one.time.total,
                "tokens_per_second": work.packs * work.load.tokens / one.time.total,
                "model_tflops": flops / one.time.total / work.world / 1e12,
                "time": dataclasses.asdict(one.time),
                "memory": dataclasses.asdict(one.memory) | {"on_device": one.memory.on_device},
            }
            for one in layouts
        ],
        "refused": [dataclasses.asdict(one) for one in refused],
    }


def _fit(arguments: argparse.Namespace, work: Work, device: Device) -> None:
    print(_heading(work, device) + "\n")
    answer: Callable[[], Any] = {"tokens": longest_sample, "model": largest_model, "devices": fewest_devices}[
        arguments.fit
    ]
    found = answer(work)
    if found is None:
        smallest = {"tokens": "a sample of 1,024 tokens", "model": "a model of one block", "devices": "it"}[
            arguments.fit
        ]
        raise ValueError(f"nothing fits: not even {smallest} will do, with {work.memory / GIB:,.1f} GiB of a device")
    what, (parallel, memory) = found
    if arguments.fit == "tokens":
        said = f"the longest sample: {what:,} tokens"
    elif arguments.fit == "model":
        count = sum(stage.elements for stage in stage_parameters(what, 1, 1))
        said = f"the largest model: {count / 1e9:,.1f}B parameters, {what.n_layers} blocks of width {what.dim:,}"
    else:
        said = f"the fewest devices: {what:,}"
        work = dataclasses.replace(work, world=what)
    print(f"{said}, on {layout_of(parallel, work.world)}, {' '.join(settings(parallel))}\n\n{_memory_table([memory])}")


def checked(arguments: argparse.Namespace, work: Work, layouts: list[Candidate]) -> str:
    """The plans of these layouts beside their simulations: ranks at both ends of the pipeline, on the same samples."""
    from lumina.benchmark.simulation import simulate
    from lumina.benchmark.throughput import latent_shape
    from lumina.model.tokens import token_count

    shape = latent_shape(arguments.tokens, work.sizes)
    frames, _, height, width = shape
    tokens = token_count(frames, height, width, work.sizes.patch_size, work.sizes.text_conditional)
    count = len(work.load.lengths)
    load = Load((tokens,) * count, work.load.captions)
    rows = []
    for number, one in enumerate(layouts, 1):
        config = work.config.model_copy(update={"parallel": one.parallel})
        for rank in sorted({0, work.world - 1}):
            found = simulate(config, work.sizes, work.world, rank, [shape] * count, load.captions)
            place = place_of(one.parallel, work.sizes, work.world, rank)
            planned = activations_under_way(config, work.sizes, work.world, load, place).on_device
            messages = pass_messages(work.sizes, one.parallel, work.config.precision, load, place)
            rows.append(
                (
                    number,
                    rank,
                    f"{planned / GIB:,.3f}",
                    f"{found.peak / GIB:,.3f}",
                    f"{planned / found.peak:.1%}",
                    f"{sum(found.messages.values()):,}",
                    f"{total_bytes(found.messages) / 1e9:,.3f}",
                    "the same" if messages == found.messages else f"{total_bytes(messages) / 1e9:,.3f} GB",
                )
            )
    columns = ("", "rank", "activations, GiB", "simulated", "", "messages of a pass", "GB", "planned")
    return f"simulated, with samples of {tokens:,} tokens:\n\n{record.table(columns, rows)}"
