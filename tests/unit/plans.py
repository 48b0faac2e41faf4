"""Plans that tests ask for."""

import argparse
from typing import Any

from lumina.benchmark.plan_work import work_of
from lumina.planner.search import Work

SMALL = ["model.dim=512", "model.n_layers=4", "model.n_heads=8", "model.n_kv_heads=4"]
_NOT_GIVEN = ("nodes", "interconnect", "network", "memory", "host_memory", "dtype", "top", "samples", "device", "out")


def asked(*overrides: str, **options: Any) -> argparse.Namespace:
    """Options as the parser gives them, None where they are not given: of a 600M on eight devices, unless they say."""
    usual = {"model": "600m", "tokens": 4096, "text_tokens": 16, "packs": 16, "gpus": 8, "simulate": 0, "json": False}
    modes = dict.fromkeys(("fit", "measured", "scaling"))
    return argparse.Namespace(**dict.fromkeys(_NOT_GIVEN) | modes | usual | options, overrides=list(overrides))


def planned(*overrides: str, **options: Any) -> Work:
    """The same as work, of a small model."""
    return work_of(asked(*SMALL, *overrides, **options))[0]
