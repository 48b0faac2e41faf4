"""`lumina plan --measured FILE`: what the plan says of layouts that `lumina benchmark throughput` measured."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumina.benchmark import record
from lumina.benchmark.compare import read_record
from lumina.benchmark.plan_options import DEFAULTS, check_numbers
from lumina.benchmark.plan_tables import parameters_of
from lumina.benchmark.plan_work import work_of
from lumina.config.schema import ParallelConfig
from lumina.parallel.layout import check_layout, described
from lumina.planner.search import Work, axes_of, memory_of, time_of, variants

_MIB = 2**20


def beside(arguments: argparse.Namespace) -> str:
    """Measured and planned speed and memory of each row, and how far their rankings agree.

    Raises:
        ValueError: for a file that is no such record, or rows of another model or layout than a plan can have.
    """
    rows = read_record(arguments.measured, "--measured")["rows"]
    if not rows:
        raise ValueError(f"--measured {arguments.measured} holds no row")
    lines, speeds = [], []
    for number, row in enumerate(rows):
        try:
            work, parallel = _of_row(arguments, row)
        except ValueError as error:
            where = f"row {number}, counted from 0, of --measured {arguments.measured}, {row['layout']}"
            raise ValueError(f"{where}: {error}") from error
        planned = work.packs * work.load.tokens / time_of(work, parallel).total
        memory = memory_of(work, parallel).on_device
        speeds.append((row["tokens_per_second"], planned))
        peak = row["memory"]["peak"]
        lines.append(
            (
                row["layout"],
                row["recompute"],
                f"{row['tokens_per_second']:,.0f}",
                f"{planned:,.0f}",
                f"{planned / row['tokens_per_second']:.2f}",
                f"{peak / _MIB:,.0f}",
                f"{memory / _MIB:,.0f}",
                f"{memory / peak:.3f}",
            )
        )
    columns = ("layout", "recompute", "tokens/s", "planned", "", "peak, MiB", "planned", "")
    said = f"{record.table(columns, lines)}"
    if len(rows) > 2:
        said += f"\n\nSpearman's correlation of the rankings by speed: {spearman(speeds):.3f} over {len(rows)} layouts"
    return said


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the ranks of two series; those that are equal have the mean of their ranks."""
    columns = np.array(pairs, float).T
    ranks = [[(np.sum(of < value) + np.sum(of <= value) + 1) / 2 for value in of] for of in columns]
    return float(np.corrcoef(ranks)[0, 1])


def _of_row(arguments: argparse.Namespace, row: dict[str, Any]) -> tuple[Work, ParallelConfig]:
    for name in ("world", "tokens_per_sample", "samples"):
        if row[name] < 1:
            raise ValueError(f"its {name} is {row[name]}")
    in_pack = _samples_per_pack(arguments.samples, row)
    measured = {
        "gpus": row["world"],
        "tokens": row["tokens_per_sample"],
        "samples": in_pack,
        "text_tokens": row["text_tokens"],
        "model": row["model"],
        "packs": row["samples"] // in_pack,
    }
    given = argparse.Namespace(**vars(arguments) | measured | {"dtype": row["precision"]})
    check_numbers(given)
    work, _ = work_of(given)
    count = parameters_of(work.sizes)
    if count != row["parameters"]:
        raise ValueError(
            f"it was measured with a model of {row['parameters']:,} parameters, and this one has {count:,}: give the "
            "settings of the model that the record's command has"
        )
    for axes in axes_of(work.world, work.sizes.n_layers):
        for parallel in variants(work, axes):
            if parallel.recompute == row["recompute"] and described(parallel, work.world) == row["layout"]:
                check_layout(work.config.model_copy(update={"parallel": parallel}), work.sizes, work.world)
                return work, parallel
    raise ValueError(f"with recompute {row['recompute']} it is no layout that a plan knows")


def _samples_per_pack(given: int | None, row: dict[str, Any]) -> int:
    """As the row says; as --samples does for a record that was written before rows said it.

    Raises:
        ValueError: where they differ, or do not divide the samples of a step.
    """
    said = row.get("samples_per_pack")
    if said is not None and (type(said) is not int or said < 1):
        raise ValueError(f"its samples_per_pack is {said!r}")
    if said is not None and given is not None and given != said:
        raise ValueError(f"it has {said} samples a pack, and not --samples {given}: leave the option out")
    count = said or given or DEFAULTS["samples"]
    if row["samples"] % count:
        whence = "as it says" if said else "give --samples as the record's command has it"
        raise ValueError(f"its {row['samples']} samples of a step are no whole packs of {count}: {whence}")
    return count
