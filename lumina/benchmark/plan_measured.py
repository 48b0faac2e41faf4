"""`lumina plan --measured FILE`: what the plan says of layouts that `lumina benchmark throughput` measured."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumina.benchmark import record
from lumina.benchmark.compare import read_record
from lumina.benchmark.plan import work_of
from lumina.config.schema import ParallelConfig
from lumina.parallel.layout import described
from lumina.planner.memory import stage_parameters
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
    for row in rows:
        work, parallel = _of_row(arguments, row)
        planned = row["tokens"] / time_of(work, parallel).total
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
    measured = {
        "gpus": row["world"],
        "tokens": row["tokens_per_sample"],
        "text_tokens": row["text_tokens"],
        "dtype": row["precision"],
        "model": row["model"],
        "packs": max(1, row["samples"] // arguments.samples),
    }
    work, _ = work_of(argparse.Namespace(**vars(arguments) | measured))
    stages = stage_parameters(work.sizes, 1, 1)
    count = sum(numel * times for stage in stages for numel, times in (*stage.trained, *stage.fixed))
    if count != row["parameters"]:
        raise ValueError(
            f"{row['layout']} was measured with a model of {row['parameters']:,} parameters, and this one has "
            f"{count:,}: give the settings of the model that its record's command has"
        )
    for axes in axes_of(work.world, work.sizes.n_layers):
        for parallel in variants(work, axes):
            if parallel.recompute == row["recompute"] and described(parallel, work.world) == row["layout"]:
                return work, parallel
    raise ValueError(f"{row['layout']}, recompute {row['recompute']}, is no layout that a plan knows")
