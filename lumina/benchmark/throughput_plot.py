"""A sweep as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.benchmark.throughput_table import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = (".png", ".svg", ".pdf")
_SPEED, _MEMORY = "tokens a second", "peak memory of a rank, GiB"


def check_plot(path: str) -> None:
    """Refuse what cannot be drawn, before anything is measured.

    Raises:
        ValueError: for another kind of file, or where matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _KINDS:
        raise ValueError(f"--plot {path}: pictures end in {', '.join(_KINDS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'lumina-t2x[plot]'") from error


def draw(path: str, entries: Sequence[Entry]) -> None:
    """Speed and memory: over tokens, a line a model and layout, where several lengths are swept; else a bar a point."""
    from matplotlib.figure import Figure  # without pyplot, and so without a display

    lengths = {entry.tokens_per_sample for entry in entries}
    bars = len(lengths) == 1
    height = max(3.0, 1.2 + 0.32 * len(entries)) if bars else 4.5
    figure = Figure(figsize=(11, height), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=bars), (_SPEED, _MEMORY), strict=True):
        (_bars if bars else _lines)(axes, entries, name)
    first = entries[0]
    ranks = "1 rank" if first.world == 1 else f"{first.world} ranks"
    figure.suptitle(f"{ranks}, {first.precision}" + (f", {first.tokens_per_sample:,} tokens a sample" if bars else ""))
    figure.savefig(path, dpi=120)


def _value(entry: Entry, name: str) -> float:
    if entry.row is None:
        return 0.0
    return entry.row.tokens_per_second if name == _SPEED else entry.row.memory["peak"] / 2**30


def _bars(axes: "Axes", entries: Sequence[Entry], name: str) -> None:
    places = range(len(entries))
    axes.barh(places, [_value(entry, name) for entry in entries], color="#3366aa" if name == _SPEED else "#aa6633")
    for place, entry in zip(places, entries, strict=True):
        if entry.row is None:
            axes.text(0, place, f" {entry.failure_in_short}", va="center")
    axes.set_yticks(places, [_label(entry, entries) for entry in entries])
    if not axes.yaxis_inverted():  # one axis for both, the first point at the top
        axes.invert_yaxis()
    axes.set_xlabel(name)


def _lines(axes: "Axes", entries: Sequence[Entry], name: str) -> None:
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        lines.setdefault(_label(entry, entries), []).append(entry)
    for number, (label, line) in enumerate(lines.items()):
        color = f"C{number % 10}"
        there = sorted((entry.tokens_per_sample, _value(entry, name)) for entry in line if entry.row is not None)
        axes.plot([at for at, _ in there], [value for _, value in there], marker="o", color=color, label=label)
        failed = [entry.tokens_per_sample for entry in line if entry.row is None]
        axes.plot(failed, [0] * len(failed), "x", color=color, label=f"{label}: failed" if failed else None)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths := sorted({entry.tokens_per_sample for entry in entries}), [f"{n:,}" for n in lengths])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel(name)
    axes.legend(fontsize="small")


def _label(entry: Entry, entries: Sequence[Entry]) -> str:
    """Of model and layout, what is not the same in all."""
    words = [entry.model] if len({other.model for other in entries}) > 1 else []
    words += [entry.layout] if len({other.layout for other in entries}) > 1 or not words else []
    return ", ".join(words)
