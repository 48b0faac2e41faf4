"""The points of a sweep as a table and as a CSV file."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lumina.benchmark import record
from lumina.benchmark.throughput import Point, Row, configured, tokens_of
from lumina.parallel.fresh_ranks import Failure
from lumina.parallel.layout import described

_OF_ROW = (
    "parameters",
    "samples",
    "tokens",
    "seconds",
    "fastest",
    "slowest",
    "tokens_per_second",
    "samples_per_second",
    "model_tflops",
    "gemm_share",
    "hardware_tflops",
    "peak_tflops",
    "mfu",
)


@dataclass(frozen=True)
class Entry:
    """A point, and what became of it.

    tokens_per_sample: as many as it takes, which may be a few less than were asked for.
    row: None where it failed.
    failure: why; empty where it did not.
    """

    model: str
    layout: str
    precision: str
    recompute: str
    world: int
    tokens_per_sample: int
    text_tokens: int
    row: Row | None
    failure: str

    @classmethod
    def of(cls, point: Point, outcome: Row | Failure, world_size: int) -> "Entry":
        config, sizes = configured(point, world_size)
        failed = isinstance(outcome, Failure)
        return cls(
            model=point.model,
            layout=described(config.parallel, world_size),
            precision=config.precision,
            recompute=config.parallel.recompute,
            world=world_size,
            tokens_per_sample=tokens_of(point.tokens, sizes),
            text_tokens=point.text_tokens,
            row=None if failed else outcome,
            failure=outcome.why if failed else "",
        )

    @property
    def failure_in_short(self) -> str:
        """Up to the first colon."""
        return self.failure.split(":")[0].split(",")[0]


def table_of(entries: Sequence[Entry]) -> str:
    """Markdown, a row a point, in their order."""
    columns = [
        "layout",
        "model",
        "tokens",
        "seconds",
        "tokens/s",
        "model TFLOP/s a device",
        "MFU",
        "peak MiB of a rank",
    ]
    lines = []
    for entry in entries:
        row, named = entry.row, [entry.layout, entry.model, f"{entry.tokens_per_sample:,}"]
        if row is None:
            lines.append([*named, entry.failure_in_short, "–", "–", "–", "–"])
            continue
        mfu = "–" if row.mfu is None else f"{row.mfu:.1%}"
        speed = [f"{row.seconds:.4g}", f"{row.tokens_per_second:,.0f}", f"{row.model_tflops:,.4g}", mfu]
        lines.append([*named, *speed, f"{row.memory['peak'] / 2**20:,.1f}"])
    return record.table(columns, lines)


def write_csv(path: str, entries: Sequence[Entry]) -> None:
    """A line a point, under a header; numbers of a point that failed are empty. In place of what is there."""
    lines = []
    for entry in entries:
        values = asdict(entry)
        row, failure = values.pop("row"), values.pop("failure")
        memory = {f"memory_{name}": size for name, size in row["memory"].items()} if row else {}
        lines.append(values | ({name: row[name] for name in _OF_ROW} if row else {}) | memory | {"failure": failure})
    named = list(dict.fromkeys(name for line in lines for name in line if name != "failure"))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*named, "failure"], restval="")
        writer.writeheader()
        writer.writerows(lines)
