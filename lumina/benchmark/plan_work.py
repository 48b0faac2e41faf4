"""What a plan is to be made of: model, load, devices and their speeds, as `lumina plan` is asked."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from lumina.benchmark.plan_options import HERE, check_settings, key_of, leaves, resolved
from lumina.config.devices import DEVICES, Device
from lumina.config.load import with_overrides
from lumina.model.config import FlagDiTConfig
from lumina.model.presets import PRESETS
from lumina.planner.cost import REACHED_OF_NETWORK, Speeds
from lumina.planner.fit import smallest_shape
from lumina.planner.search import RESERVED, Work, usable
from lumina.planner.traffic import Load

STEP_TOKENS = 4 * 2**20
PER_HOST = 8
GIB = 2**30
_LARGEST = {"n_layers": 2**8, "patch_size": 2**8, "num_classes": 2**24}
_LARGEST_SIZE = 2**17  # of all other sizes


def work_of(given: argparse.Namespace) -> tuple[Work, Device]:
    """`given`: options that `check_options` let pass, None for those that were not given.

    Raises:
        ValueError: for what does not fit together.
    """
    arguments = resolved(given)
    if arguments.model not in PRESETS:
        raise ValueError(f"--model {arguments.model} is not one of {', '.join(PRESETS)}; key=value changes its sizes")
    words = leaves(arguments.overrides)
    world = PER_HOST if arguments.fit == "devices" else arguments.gpus
    pack = arguments.tokens * arguments.samples
    packs = arguments.packs or (world if arguments.fit else _shared(STEP_TOKENS // pack, world))
    model: dict[str, Any] = {"preset": arguments.model}
    if arguments.fit == "model":
        model = smallest_shape(_held_kv_heads(words))
    tree: dict[str, Any] = {
        "run": {"dir": "none"},
        "model": model | {"in_channels": 4},
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "ema_decay": 0.9999, "tokens_per_pack": pack, "global_batch_packs": packs},
        "precision": arguments.dtype,
    }
    config = with_overrides(tree, words, "plan")
    check_settings(given, words)
    config = config.model_copy(update={"model": _conditioned(config.model, arguments.text_tokens)})
    sizes = FlagDiTConfig.from_dict(config.model)
    _check_sizes(sizes)
    fixed = frozenset(key_of(word).removeprefix("parallel.") for word in words if word.startswith("parallel."))
    per_host = _per_host(world, arguments.nodes)
    device, speeds = _speeds(arguments, config.precision, per_host)
    _check_heeded(given, speeds, world)
    captions = (arguments.text_tokens,) * arguments.samples if sizes.text_conditional else ()
    load = Load((arguments.tokens,) * arguments.samples, captions)
    memory = usable(device.memory, RESERVED if speeds.cores is None else 0)
    if memory <= 0:
        raise ValueError(f"a device of {device.memory / GIB:,.1f} GiB has nothing to plan with: 2 go to CUDA and NCCL")
    host_memory = arguments.host_memory * GIB
    return Work(config, sizes, load, config.train.global_batch_packs, world, memory, host_memory, speeds, fixed), device


def _conditioned(model: dict[str, Any], text_tokens: int) -> dict[str, Any]:
    """Settings of a model with what it is conditioned on, where they do not say it.

    Raises:
        ValueError: where they say otherwise than the tokens of a caption.
    """
    classes, width = model.get("num_classes"), model.get("cap_feat_dim")
    if text_tokens and classes is not None:
        raise ValueError(
            f"model.num_classes={classes} is of a label-conditional model, which reads no captions, and they are "
            f"planned with {text_tokens} tokens: give --text-tokens 0 with it"
        )
    if not text_tokens and width is not None:
        raise ValueError(
            f"model.cap_feat_dim={width} is of a model that reads captions, and --text-tokens 0 plans a "
            "label-conditional one: give their tokens, or leave the setting out"
        )
    name, usual = ("cap_feat_dim", 4096) if text_tokens else ("num_classes", 1000)
    return model if model.get(name) is not None else model | {name: usual}


def _held_kv_heads(words: list[str]) -> int | None:
    """What `model.n_kv_heads` is held at; None where it is not, or not at a number that could be."""
    given = [word.partition("=")[2].strip() for word in words if key_of(word) == "model.n_kv_heads"]
    return int(given[-1]) if given and given[-1].isdecimal() and int(given[-1]) else None


def _check_sizes(sizes: FlagDiTConfig) -> None:
    for name, value in dataclasses.asdict(sizes).items():
        most = _LARGEST.get(name, _LARGEST_SIZE)
        if (isinstance(value, int) and value > most) or (isinstance(value, float) and not value <= most):
            raise ValueError(f"model.{name}={value}: plans are made for numbers up to {most:,}")
    if sizes.ffn_dim > 8 * _LARGEST_SIZE:
        raise ValueError(
            f"the feed-forward width {sizes.ffn_dim:,}, from model.ffn_dim_multiplier={sizes.ffn_dim_multiplier} and "
            f"model.multiple_of={sizes.multiple_of}, is more than the {8 * _LARGEST_SIZE:,} that plans are made for"
        )


def _check_heeded(given: argparse.Namespace, speeds: Speeds, world: int) -> None:
    """
    Raises:
        ValueError: for options that the devices leave no use for.
    """
    if speeds.cores is not None and given.host_memory is not None:
        raise ValueError("a CPU's memory is its host's: give --memory of a rank, in place of --host-memory")
    if speeds.cores is not None and given.fit == "devices":
        raise ValueError(
            "ranks of a CPU share its memory, so more of them have no more: --fit devices is of devices with memory "
            "of their own, as h100-80g"
        )
    if given.interconnect is not None and given.scaling is None and world <= speeds.per_host:
        raise ValueError(
            f"--interconnect is of devices on several hosts, and {world} are on one: leave it out, or say on how many "
            "they are with --nodes"
        )


def _shared(packs: int, world: int) -> int:
    """About so many packs, that as many ranks can share as may be."""
    if packs >= world:
        return packs // world * world
    return max(size for size in range(1, max(1, packs) + 1) if world % size == 0)


def _per_host(world: int, hosts: int | None) -> int:
    if hosts is None:
        return min(world, PER_HOST)
    if world % hosts:
        nearest = max(size for size in range(1, min(hosts, world) + 1) if world % size == 0)
        raise ValueError(f"--gpus {world} cannot be shared evenly by --nodes {hosts}; {nearest} could share them")
    return world // hosts


def _speeds(arguments: argparse.Namespace, precision: str, per_host: int) -> tuple[Device, Speeds]:
    within = between = None
    if arguments.network is not None:
        within, between = _measured_network(Path(arguments.network))
    if arguments.device == HERE:
        from lumina.benchmark.rates import here

        device, speeds = here(precision, per_host)
    elif arguments.device in DEVICES:
        device = DEVICES[arguments.device]
        speeds = Speeds.of(device, precision, per_host)
    else:
        raise ValueError(f"--device {arguments.device} is not one of {', '.join(DEVICES)}, or `{HERE}`")
    if arguments.interconnect is not None:
        if between is not None:
            raise ValueError(
                f"--network {arguments.network} has what devices send to other hosts, as --interconnect says too: "
                "leave one of them out"
            )
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

    kind_of_file = f"--network {path} is no record of `lumina benchmark network --out`"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--network {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{kind_of_file}: it is not JSON ({error})") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "what" in row for row in rows):
        raise ValueError(f"{kind_of_file}: it has no list `rows` of measurements that say `what` they are of")
    found: dict[str, list[float]] = {WITHIN: [], LINK: []}
    for row in rows:
        if row["what"] in (WITHIN, LINK):
            speed = row.get("bandwidth")
            if not isinstance(speed, int | float) or not 0 < speed < math.inf:
                raise ValueError(f"{kind_of_file}: the bandwidth of a measurement {row['what']} is {speed!r}")
            found[row["what"]].append(float(speed))
    within, between = (min(found[kind], default=None) for kind in (WITHIN, LINK))
    if within is None and between is None:
        raise ValueError(f"--network {path} holds no measurement within a host or between two")
    return within, between
