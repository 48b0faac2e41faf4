"""`lumina plan --scaling`: the fastest layout that fits on more and more devices, and what of their number it gains."""

import argparse
import dataclasses

from lumina.benchmark import record
from lumina.benchmark.plan import GIB, layout_of, model_flops, settings, work_of
from lumina.planner.search import Work, search

SMALLEST, LARGEST = 8, 4096


def scaling(arguments: argparse.Namespace) -> str:
    """A row for each power of two of devices, up to 4,096, on hosts of as many as the first has.

    Weak: packs of a step grow with the devices, from those that are asked for on the fewest. Strong: they stay.

    Raises:
        ValueError: for what does not fit together.
    """
    weak = arguments.scaling == "weak"
    fewest = arguments.gpus
    if not SMALLEST <= fewest <= LARGEST or fewest & (fewest - 1):
        raise ValueError(f"--scaling starts from a power of two of devices, from 8 to 4,096, and not from {fewest}")
    first, device = work_of(arguments)
    peak = {"bf16": device.tflops, "fp32": device.tflops_fp32}[first.config.precision] * 1e12
    rows, base = [], None
    world = fewest
    while world <= LARGEST:
        work = _with(first, world, first.packs * (world // fewest if weak else 1))
        best = next((one for one in search(work)[0] if one.fits), None)
        if best is None:
            rows.append((f"{world:,}", f"{work.packs:,}", "none fits"))
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
    columns = ("devices", "packs", "layout", "s", "tokens/s", "efficiency", "MFU", "waiting", "GiB", "settings")
    return record.table(columns, [(*row, *[""] * (len(columns) - len(row))) for row in rows])


def _with(work: Work, world: int, packs: int) -> Work:
    train = work.config.train.model_copy(update={"global_batch_packs": packs})
    config = work.config.model_copy(update={"train": train})
    return dataclasses.replace(work, config=config, packs=packs, world=world)
