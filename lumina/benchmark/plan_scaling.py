"""`lumina plan --scaling`: the fastest layout that fits on more and more devices, and what of their number it gains."""

import argparse
import dataclasses

from lumina.benchmark import record
from lumina.benchmark.plan_layouts import layouts_of, why_none
from lumina.benchmark.plan_options import resolved
from lumina.benchmark.plan_tables import layout_of, model_flops, parameters_of, room, settings
from lumina.benchmark.plan_work import GIB, work_of
from lumina.config.devices import Device
from lumina.planner.search import Work

SMALLEST, LARGEST = 8, 4096


def scaling(arguments: argparse.Namespace) -> str:
    """What is asked, and a row for each power of two of devices, up to 4,096, on hosts of as many as the first has.

    Weak: packs of a step grow with the devices, from those that are asked for on the fewest. Strong: they stay.

    Raises:
        ValueError: for what does not fit together, or leaves no layout on any of these numbers of devices.
    """
    weak = arguments.scaling == "weak"
    fewest = resolved(arguments).gpus
    if not SMALLEST <= fewest <= LARGEST or fewest & (fewest - 1):
        raise ValueError(f"--scaling starts from a power of two of devices, from 8 to 4,096, and not from {fewest}")
    first, device = work_of(arguments)
    peak = {"bf16": device.tflops, "fp32": device.tflops_fp32}[first.config.precision] * 1e12
    rows, base, reasons = [], None, []
    world = fewest
    while world <= LARGEST:
        work = _with(first, world, first.packs * (world // fewest if weak else 1))
        candidates, refused = layouts_of(work)
        best = next((one for one in candidates if one.fits), None)
        if best is None:
            if not candidates:
                reasons.append(f"{world:,} devices: {why_none(work, refused)}")
            rows.append((f"{world:,}", f"{work.packs:,}", "none fits" if candidates else "none can run"))
        else:
            seconds = best.time.total
            rate = work.packs * work.load.tokens / seconds
            base = base or rate / world
            rows.append(
                (
                    f"{world:,}",
                    f"{work.packs:,}",
                    layout_of(best.parallel, world),
                    f"{seconds:,.3g}",
                    f"{rate:,.0f}",
                    f"{rate / world / base:.1%}",
                    f"{model_flops(work) / seconds / world / peak:.1%}",
                    f"{best.time.exposed:.1%}",
                    f"{best.memory.on_device / GIB:,.1f}",
                    " ".join(settings(best.parallel)) or "(defaults)",
                )
            )
        world *= 2
    if len(reasons) == len(rows):
        raise ValueError(reasons[0])
    columns = ("devices", "packs", "layout", "s", "tokens/s", "efficiency", "MFU", "waiting", "GiB", "settings")
    table = record.table(columns, [(*row, *[""] * (len(columns) - len(row))) for row in rows])
    return "\n\n".join([_heading(first, device, weak), table, *reasons])


def _heading(first: Work, device: Device, weak: bool) -> str:
    lengths, per_host = first.load.lengths, first.speeds.per_host
    packs = f"{first.packs / first.world:g} packs a step for each device" if weak else f"{first.packs:,} packs a step"
    return (
        f"{parameters_of(first.sizes) / 1e9:,.2f}B parameters, {first.config.precision}; {len(lengths)} × "
        f"{lengths[0]:,} tokens a pack, {packs}\n{device.name}, {per_host} to a host; {room(first)}"
    )


def _with(work: Work, world: int, packs: int) -> Work:
    train = work.config.train.model_copy(update={"global_batch_packs": packs})
    config = work.config.model_copy(update={"train": train})
    return dataclasses.replace(work, config=config, packs=packs, world=world)
