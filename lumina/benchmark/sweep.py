"""`lumina benchmark throughput`, the verb: one point in the ranks, or a sweep with processes for each of its points."""

import argparse
import dataclasses
import itertools
import math
import sys
from typing import Any

from lumina.benchmark import record
from lumina.benchmark.compare import comparison, read_record
from lumina.benchmark.throughput import Bench, Point, Row, configured, tables_of
from lumina.benchmark.throughput_plot import check_plot, draw
from lumina.benchmark.throughput_table import Entry, table_of, write_csv
from lumina.config.schema import Config
from lumina.data.processes import end_with_the_caller
from lumina.parallel.fresh_ranks import Failure, FreshRanks
from lumina.parallel.mesh import World, close_mesh, open_mesh

_SWEPT = {"layouts": "layout", "tokens": "tokens", "model": "model"}
_AXES = {"tp": "tensor", "pp": "pipeline", "ring": "ring", "ulysses": "ulysses", "zero": "zero_stage"}
_EXAMPLES = {"tokens": "--tokens 4096 16384 65536", "model": "--model 600m 3b", "layout": "--layout zero=1 ring=2"}
# What points import, once for all of them where they may be forked.
_PRELOAD = (
    "lumina.benchmark.sweep",
    "lumina.parallel.tensor",
    "lumina.parallel.ring",
    "lumina.parallel.ulysses",
    "torch._inductor.compile_fx",
)


def benchmark_throughput(arguments: argparse.Namespace) -> None:
    """The verb: measures; rank 0 prints, and writes what is asked for."""
    world = World.from_environment()
    points, refused = points_of(arguments, world.size)
    for option in ("plot", "trace"):
        if getattr(arguments, option) is not None and bool(arguments.sweep) != (option == "plot"):
            raise ValueError("--plot is of a sweep and --trace of one point: leave one out, or --sweep")
    report = _Report(arguments, refused, world.size) if world.rank == 0 else None
    if not arguments.sweep:
        _in_this_process(points[0], report)
    else:
        _in_fresh_processes(points, report, bool(arguments.debug))


def points_of(arguments: argparse.Namespace, world_size: int) -> tuple[list[Point], list[dict[str, str]]]:
    """What is to be measured, every point of it fit to run; and of all layouts those that are not, with the reason.

    Raises:
        ValueError: for what cannot be measured, or several values of what is not swept.
    """
    swept = {_SWEPT[name] for name in arguments.sweep or ()}
    values, overrides = _values(arguments)
    for option, words in values.items():
        if option in swept and len(words) < 2 and (option != "layout" or words):
            raise ValueError(f"a sweep of {option} takes several, as {_EXAMPLES[option]}")
        if option not in swept and len(words) > 1:
            sweep = next(name for name, swept_option in _SWEPT.items() if swept_option == option)
            raise ValueError(f"several of --{option} ({' '.join(words)}) are measured by --sweep {sweep}")
    common = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Point)
        if field.name not in ("peak", "overrides", *values)
    }
    common |= {"overrides": overrides, "peak": _peak(arguments.peak)}
    every = "layout" in swept and not values["layout"]
    layouts = _every_layout(world_size, overrides) if every else values["layout"] or [""]
    points, refused = [], []
    for model, layout, tokens in itertools.product(values["model"], layouts, values["tokens"]):
        point = Point(model=model, layout=layout, tokens=_number(tokens), **common)
        try:
            configured(point, world_size)
        except ValueError as error:
            if not every:
                raise
            refused.append({"model": model, "layout": layout, "why": str(error)})
        else:
            points.append(point)
    if not points:
        raise ValueError(f"no layout of {world_size} ranks can run; of {refused[-1]['layout']}: {refused[-1]['why']}")
    return points, [one for number, one in enumerate(refused) if one not in refused[:number]]


def _values(arguments: argparse.Namespace) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Of each option that can be swept; and settings, also those that stand behind such an option."""
    values, overrides = {}, list(arguments.overrides)
    for option in _SWEPT.values():
        words = getattr(arguments, option)
        settings = [word for word in words if _is_setting(word, option)]
        values[option] = list(dict.fromkeys(word for word in words if word not in settings))
        overrides += settings
    return values, tuple(overrides)


def _is_setting(word: str, option: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and (option != "layout" or "." in key or key in Config.model_fields)


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"--tokens {word} is no whole number") from None


def _peak(word: str | None) -> str | float | None:
    if word in (None, "measured"):
        return word
    try:
        peak = float(word)
    except ValueError:
        raise ValueError(f"--peak {word} is no number of TFLOP/s, and not `measured`") from None
    if not 0 < peak < math.inf:
        raise ValueError(f"--peak {word}: it is more than 0 TFLOP/s")
    return peak


def _every_layout(world_size: int, overrides: tuple[str, ...]) -> list[str]:
    """All products of axes that divide the world, with every ZeRO stage; the smallest cuts first."""
    keys = {override.partition("=")[0].removeprefix("parallel.") for override in overrides}
    if taken := sorted(keys & set(_AXES.values())):
        raise ValueError(f"parallel.{taken[0]} is what a sweep of all layouts changes; leave it out or give layouts")
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    products = [sizes for sizes in itertools.product(divisors, repeat=4) if world_size % math.prod(sizes) == 0]
    layouts = []
    for sizes in sorted(products, key=lambda sizes: (math.prod(sizes), max(sizes), sizes)):
        for stage in range(4):
            pairs = zip(_AXES, (*sizes, stage), strict=True)
            layouts.append(",".join(f"{name}={size}" for name, size in pairs if name == "zero" or size > 1))
    return layouts


def _in_this_process(point: Point, report: "_Report | None") -> None:
    config, sizes = configured(point, World.from_environment().size)
    mesh = open_mesh(config.parallel)
    try:
        bench = Bench(point, config, sizes, mesh)
        try:
            row = bench.measure()
        finally:
            bench.engine.close()
        if report is not None:
            report.add(point, row, record.surroundings(mesh.device))
            print(f"{record.heading(report.results.facts)}\n{tables_of(row)}")
            report.compare()
    finally:
        close_mesh(mesh)


def _in_fresh_processes(points: list[Point], report: "_Report | None", debug: bool) -> None:
    first_failure, measured = None, 0
    with FreshRanks(_PRELOAD, debug) as ranks:
        for number, point in enumerate(points, start=1):
            if report is not None:
                print(f"[{number}/{len(points)}] {point}", file=sys.stderr, flush=True)
                point = report.with_known_peak(point)
            outcome = ranks.run(_measured, point)
            if isinstance(outcome, Failure):
                first_failure = first_failure or outcome
            else:
                measured += 1
            if report is not None:
                report.add(point, *((outcome, {}) if isinstance(outcome, Failure) else outcome))
    if report is not None:
        report.end()
    if not measured:
        raise RuntimeError(
            f"none of {len(points)} points could be measured; the first, on rank {first_failure.rank}: "
            f"{first_failure.why}"
        )


def _measured(store: Any, point: Point) -> tuple[Row, dict[str, Any]] | None:
    """In a process of its own: on the first rank the row, and what is said of a record."""
    end_with_the_caller()
    config, sizes = configured(point, World.from_environment().size)
    mesh = open_mesh(config.parallel, store)
    row = Bench(point, config, sizes, mesh).measure()
    return (row, record.surroundings(mesh.device)) if mesh.is_first else None


class _Report:
    """On the first rank: what has been measured, written after every point."""

    def __init__(self, arguments: argparse.Namespace, refused: list[dict[str, str]], world_size: int):
        self._arguments, self._refused, self._world_size = arguments, refused, world_size
        for option in ("out", "csv", "plot", "trace"):
            record.check_writable(getattr(arguments, option), f"--{option}")
        if arguments.plot is not None:
            check_plot(arguments.plot)
        self._earlier = None if arguments.compare is None else read_record(arguments.compare)
        facts = {"sweep": arguments.sweep, "refused": refused} if arguments.sweep else {}
        self.results = record.Results(arguments.out, facts)
        self._entries: list[Entry] = []

    def with_known_peak(self, point: Point) -> Point:
        """A peak that was measured once is that of all points."""
        known = [row.peak_tflops for row in self.results.rows if row.peak_tflops]
        return dataclasses.replace(point, peak=known[0]) if point.peak == "measured" and known else point

    def add(self, point: Point, outcome: Row | Failure, facts: dict[str, Any]) -> None:
        """`facts`: of the record, where they are known."""
        self.results.facts = facts | self.results.facts
        self._entries.append(Entry.of(point, outcome, self._world_size))
        if isinstance(outcome, Failure):
            self.results.add_failure(str(point), f"rank {outcome.rank}: {outcome.why}")
        else:
            self.results.add(str(point), [outcome])
        if self._arguments.csv is not None:
            write_csv(self._arguments.csv, self._entries)

    def end(self) -> None:
        """Print and draw a sweep."""
        if not self.results.rows:
            return
        print(f"{record.heading(self.results.facts)}\n{table_of(self._entries)}{self.results.said()}")
        for one in self._refused:
            print(f"Cannot run: {one['model']}, {one['layout']}: {one['why']}")
        if self._arguments.plot is not None:
            draw(self._arguments.plot, self._entries)
        self.compare()

    def compare(self) -> None:
        """Print what --compare asks for."""
        if self._earlier is not None:
            print("\n" + comparison(self.results.content(), self._earlier, self._arguments.compare))
