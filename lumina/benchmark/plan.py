"""`lumina plan`: what the planner finds, as tables or JSON."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lumina.benchmark import record
from lumina.benchmark.plan_layouts import layouts_of, why_none
from lumina.benchmark.plan_options import check_options, resolved
from lumina.benchmark.plan_tables import heading, layout_of, model_flops, settings, tables, why
from lumina.benchmark.plan_work import work_of
from lumina.config.devices import Device
from lumina.planner.search import Candidate, Refused, Work, best_of_each


def plan(arguments: argparse.Namespace) -> None:
    """The verb."""
    check_options(arguments)
    record.check_writable(arguments.out)
    if arguments.measured is not None:
        from lumina.benchmark.plan_measured import beside

        print(beside(arguments))
    elif arguments.scaling is not None:
        from lumina.benchmark.plan_scaling import scaling

        print(scaling(arguments))
    elif arguments.fit is not None:
        from lumina.benchmark.plan_fit import fit

        print(fit(arguments))
    else:
        _layouts(arguments)


def _layouts(given: argparse.Namespace) -> None:
    work, device = work_of(given)
    arguments = resolved(given)
    candidates, refused = layouts_of(work)
    layouts = best_of_each(candidates)
    if not layouts:
        raise ValueError(why_none(work, refused))
    content = _content(arguments.model, work, device, layouts, refused)
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(content))
        return
    print(heading(work, device))
    print("\n" + "\n\n".join(tables(work, device, layouts, refused, arguments.top)))
    if arguments.simulate and not any(one.fits for one in layouts):
        print("\nnothing fits that could be simulated")
    elif arguments.simulate:
        from lumina.benchmark.plan_simulated import checked

        print("\n" + checked(work, [one for one in layouts if one.fits][: arguments.simulate]))


def _content(
    model: str, work: Work, device: Device, layouts: list[Candidate], refused: list[Refused]
) -> dict[str, Any]:
    flops = model_flops(work)
    return {
        "model": model,
        "config": {
            "model": work.config.model,
            "precision": work.config.precision,
            "train": {"tokens_per_pack": work.load.tokens, "global_batch_packs": work.packs},
        },
        "sizes": dataclasses.asdict(work.sizes),
        "tokens": list(work.load.lengths),
        "captions": list(work.load.captions),
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
                "why": None if one.fits else why(one.memory, work),
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
