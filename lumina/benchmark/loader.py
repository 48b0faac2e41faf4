"""`lumina benchmark loader`: what pictures cost until they can be trained on, how memory goes, how an index starts."""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lumina.benchmark import record, synthetic
from lumina.benchmark.photographs import SHARDS, Photographs, photographs
from lumina.benchmark.pipelines import AT_ONCE, MULTIPLE, PIPELINES
from lumina.benchmark.processes import cpu_seconds, in_fresh_process, memory

EVERY = 5.0
"""Seconds between two looks at the memory."""
PACKAGES = ("pillow", "webdataset", "scikit-image")


@dataclass(frozen=True)
class SpeedRow:
    """One run of one pipeline, its first pictures not counted."""

    pipeline: str
    workers: int
    repetition: int
    pictures: int
    seconds: float
    cpu_seconds: float  # user and system, of all its processes
    resident_bytes: int  # of all its processes, at the end
    proportional_bytes: int  # likewise, pages that they share counted once


@dataclass(frozen=True)
class MemoryRow:
    """The memory of our pipeline with all its processes, so many seconds after its first pictures."""

    seconds: float
    pictures: int
    resident_bytes: int
    proportional_bytes: int


def benchmark_loader(arguments: argparse.Namespace) -> None:
    """The verb: measures, writes each row to `--out` when it is there, and prints a table at the end."""
    _check(arguments)
    record.check_writable(arguments.out)
    facts = record.surroundings(torch.device("cpu"))
    facts["packages"] |= record.versions(PACKAGES)
    print(record.heading(facts))
    results = record.Results(arguments.out, facts)
    with _folder(arguments.dir) as folder:
        if arguments.index is not None:
            said = _index(arguments, folder, results)
        else:
            pictures = _pictures(arguments, folder)
            said = (_memory if arguments.minutes is not None else _speed)(arguments, pictures, results)
    if not results.rows:
        raise RuntimeError(f"nothing could be measured{results.said()}")
    print(f"{said()}{results.said()}")


def _check(arguments: argparse.Namespace) -> None:
    least = {"images": SHARDS, "resolution": MULTIPLE, "repeats": 1, "samples": 1, "index": 1}
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} {value}: it is at least {bound}")
    if arguments.resolution % MULTIPLE:
        raise ValueError(f"--resolution {arguments.resolution} is not a multiple of {MULTIPLE} pixels")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise ValueError(f"--minutes {arguments.minutes}: it is above 0")
    for workers in arguments.workers:
        if not 0 <= workers <= SHARDS:
            raise ValueError(f"--workers {workers}: from 0 to {SHARDS}, as webdataset wants a shard for each")


@contextlib.contextmanager
def _folder(name: str | None) -> Iterator[Path]:
    if name is not None:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="lumina-benchmark-") as made:
        yield Path(made)


def _pictures(arguments: argparse.Namespace, folder: Path) -> Photographs:
    def progress(done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            print(f"{done:,} of {total:,} pictures made …", file=sys.stderr)

    pictures = photographs(folder, arguments.images, progress)
    mean = pictures.bytes / pictures.count
    print(f"{pictures.count:,} JPEGs, {mean / 1e3:,.0f} kB each on average.\n")
    return pictures


def _speed(arguments: argparse.Namespace, pictures: Photographs, results: record.Results) -> Callable[[], str]:
    settings = [(workers, repetition) for workers in arguments.workers for repetition in range(arguments.repeats)]
    names = list(PIPELINES)
    for number, (workers, repetition) in enumerate(settings):
        # In turn, and each as often before the others as after: what else the machine does hits all alike.
        for name in np.roll(names, number).tolist():
            print(f"{name}, {workers} workers, repetition {repetition + 1} …", file=sys.stderr)
            run = (name, pictures, arguments.resolution, workers, repetition, arguments.samples)
            results.add(f"{name}, {workers} workers", _rows(lambda run=run: [in_fresh_process(measured_speed, *run)]))
    return lambda: speed_table(results.rows)


def measured_speed(
    name: str, pictures: Photographs, resolution: int, workers: int, repetition: int, samples: int
) -> SpeedRow:
    """Runs a pipeline; to be called in a fresh process."""
    torch.set_num_threads(1)  # a core's worth is asked for
    stream = PIPELINES[name](pictures, resolution, workers)
    _take(stream, AT_ONCE * (1 + 3 * workers))  # what was decoded ahead while nobody waited
    used, start = cpu_seconds(), time.perf_counter()
    count = _take(stream, samples)
    seconds, used, held = time.perf_counter() - start, cpu_seconds() - used, memory()
    stream.close()
    return SpeedRow(name, workers, repetition, count, seconds, used, *held)


def _take(stream: Iterator[list], least: int) -> int:
    count = 0
    while count < least:
        count += len(next(stream))
    return count


def speed_table(rows: list[SpeedRow]) -> str:
    """A line for each pipeline and number of workers: medians, and ours against it."""
    lines = []
    groups: dict[tuple[int, str], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault((row.workers, row.pipeline), []).append(row)
    medians = {
        key: [
            statistics.median(of)
            for of in zip(
                *[
                    (r.pictures / r.cpu_seconds, r.pictures / r.seconds, r.resident_bytes, r.proportional_bytes)
                    for r in group
                ],
                strict=True,
            )
        ]
        for key, group in groups.items()
    }
    for (workers, name), (a_core, a_second, *held) in medians.items():
        ours = medians.get((workers, "lumina"))
        ratios = ["–", "–"] if ours is None else [f"{ours[0] / a_core:.2f}×", f"{ours[1] / a_second:.2f}×"]
        of_core = sorted(row.pictures / row.cpu_seconds for row in groups[workers, name])
        spread = f"{of_core[0]:.1f} – {of_core[-1]:.1f}"
        memories = [f"{size / 2**20:,.0f}" for size in held]
        lines.append((workers, name, f"{a_core:.1f}", spread, ratios[0], f"{a_second:.1f}", ratios[1], *memories))
    columns = ["workers", "pipeline", "pictures / CPU second", "range", "lumina is", "pictures / s", "lumina is"]
    return record.table([*columns, "RSS, MiB", "PSS, MiB"], lines)


def _memory(arguments: argparse.Namespace, pictures: Photographs, results: record.Results) -> Callable[[], str]:
    workers = max(arguments.workers)
    run = (pictures, arguments.resolution, workers, arguments.minutes * 60)
    results.add(f"memory, {workers} workers", _rows(lambda: in_fresh_process(measured_memory, *run)))
    return lambda: memory_said(results.rows)


def measured_memory(pictures: Photographs, resolution: int, workers: int, seconds: float) -> list[MemoryRow]:
    """Runs our pipeline for so long; to be called in a fresh process."""
    torch.set_num_threads(1)
    stream = PIPELINES["lumina"](pictures, resolution, workers)
    count = _take(stream, AT_ONCE * (1 + 3 * workers))
    start, rows = time.perf_counter(), []
    while True:
        passed = time.perf_counter() - start
        if not rows or passed - rows[-1].seconds >= EVERY:
            rows.append(MemoryRow(passed, count, *memory()))
        if passed >= seconds:
            stream.close()
            return rows
        count += _take(stream, 1)


def memory_said(rows: list[MemoryRow]) -> str:
    """The course of the memory in ten lines, and its slope over the second half."""
    shown = rows[:: max(1, len(rows) // 10)]
    table = record.table(
        ["seconds", "pictures", "RSS, MiB", "PSS, MiB"],
        [
            (f"{row.seconds:.0f}", f"{row.pictures:,}", *(f"{size / 2**20:,.1f}" for size in _held(row)))
            for row in shown
        ],
    )
    late = rows[len(rows) // 2 :]
    peaks = " and ".join(f"{max(sizes) / 2**20:,.1f}" for sizes in zip(*map(_held, rows), strict=True))
    said = f"{table}\n\nPeaks of RSS and PSS {peaks} MiB"
    if len(late) < 3:
        return f"{said}; too short for a slope."
    slopes = " and ".join(f"{slope(late, name) * 60 / 2**20:+.3f}" for name in ("resident_bytes", "proportional_bytes"))
    return f"{said}; slopes over the second half {slopes} MiB a minute."


def _held(row: MemoryRow) -> tuple[int, int]:
    return row.resident_bytes, row.proportional_bytes


def slope(rows: list[MemoryRow], name: str) -> float:
    """Growth a second of the field `name`, by least squares."""
    seconds, held = (np.array([getattr(row, of) for row in rows], float) for of in ("seconds", name))
    return float(np.polyfit(seconds - seconds.mean(), held, 1)[0])


def _index(arguments: argparse.Namespace, folder: Path, results: record.Results) -> Callable[[], str]:
    shards = synthetic.indexes(folder, arguments.index)
    for _ in range(arguments.repeats):
        results.add("index", _rows(lambda: [in_fresh_process(synthetic.measured_index, shards)]))
    return lambda: index_table(results.rows)


def index_table(rows: list[synthetic.IndexRow]) -> str:
    """What was measured, with the median and the range of the repetitions."""
    first = rows[0]
    text = (
        f"{first.samples:,} samples of {first.distinct_sizes:,} sizes in {first.shards:,} shards; a global batch of "
        f"{synthetic.PACKS} packs, and as many lanes: {first.first_batch_samples:,} samples."
    )
    measures = {
        "index opened, s": [row.open_seconds for row in rows],
        "planned, s": [row.plan_seconds for row in rows],
        "first global batch, s": [row.first_batch_seconds for row in rows],
        "together, s": [row.open_seconds + row.plan_seconds + row.first_batch_seconds for row in rows],
        "together, CPU s": [row.start_cpu_seconds for row in rows],
        f"next {synthetic.FURTHER_BATCHES} global batches, s": [row.further_batches_seconds for row in rows],
        "memory once all is imported, MiB": [row.imported_bytes / 2**20 for row in rows],
        "peak memory up to the first global batch, MiB": [row.peak_bytes / 2**20 for row in rows],
        "peak memory at the end, MiB": [row.final_peak_bytes / 2**20 for row in rows],
    }
    lines = [
        (name, f"{statistics.median(of):,.2f}", f"{min(of):,.2f} – {max(of):,.2f}") for name, of in measures.items()
    ]
    return f"{text}\n\n{record.table(['', 'median', 'range'], lines)}"


def _rows(measure: Callable[[], list]) -> Iterator:
    # Measured only when the results ask for it, who keep why it failed.
    yield from measure()
