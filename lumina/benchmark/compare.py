"""`lumina benchmark throughput --compare FILE`: ratios to an earlier record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina.benchmark import record

# Rows that agree in these have measured the same.
SAME = {
    "model": str,
    "parameters": int,
    "layout": str,
    "precision": str,
    "recompute": str,
    "world": int,
    "tokens_per_sample": int,
    "text_tokens": int,
    "samples": int,
}
_SPEEDS = ("tokens_per_second", "model_tflops")


def read_record(path: str, option: str = "--compare") -> dict[str, Any]:
    """What `--out` wrote; `option` names the file.

    Raises:
        ValueError: for a file that is not there, or not of this kind: what is missing.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option} {path} is not JSON: {error}") from error
    if wrong := _wrong(content):
        raise ValueError(f"{option} {path} is no record that `lumina benchmark throughput --out` wrote: {wrong}")
    return content


def _wrong(content: Any) -> str:
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        return "it has no list `rows`"
    for name, kind in (("date", str), ("device", str), ("python", str), ("packages", dict)):
        if content["rows"] and not isinstance(content.get(name), kind):
            return f"it does not say its {name}"
    for number, row in enumerate(content["rows"]):
        where = f"row {number}, counted from 0,"
        if not isinstance(row, dict):
            return f"{where} is {row!r}"
        for name, kind in SAME.items():
            if not isinstance(row.get(name), kind):
                return f"{where} has no {name}" if name not in row else f"{name} of {where} is {row[name]!r}"
        memory = row.get("memory")
        sizes = {"memory.peak": memory.get("peak") if isinstance(memory, dict) else None}
        for name, value in ({speed: row.get(speed) for speed in _SPEEDS} | sizes).items():
            if not isinstance(value, int | float) or not value > 0:
                return f"{name} of {where} is {value!r}"
    return ""


def comparison(now: Mapping[str, Any], earlier: Mapping[str, Any], name: str) -> str:
    """Ratios of `now` to `earlier`, called `name`, for rows that both have; in sentences, what else differs."""
    ours = {_key(row): row for row in now["rows"]}
    theirs = {_key(row): row for row in earlier["rows"]}
    lines = []
    for key, row in ours.items():
        if (other := theirs.get(key)) is not None:
            ratios = [row[speed] / other[speed] for speed in _SPEEDS] + [
                row["memory"]["peak"] / other["memory"]["peak"]
            ]
            lines.append([row["layout"], row["model"], f"{row['tokens_per_sample']:,}", *(f"{r:.3f}" for r in ratios)])
    columns = ["layout", "model", "tokens", "tokens/s", "model TFLOP/s", "peak memory"]
    said = [f"Ratios to {name}, of {earlier.get('date', 'an unknown date')}:"]
    said += [record.table(columns, lines)] if lines else ["no row of one is in the other"]
    said += _alone(ours, theirs, f"not in {name}", "there")
    said += _alone(theirs, ours, f"only in {name}", "here")
    return "\n".join([*said, *_differences(now, earlier)])


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in SAME)


def _alone(rows: Mapping[tuple, Any], others: Mapping[tuple, Any], what: str, place: str) -> list[str]:
    """Rows without a counterpart, a sentence each: what is different in the nearest of the others."""
    said = []
    for key in rows:
        if key in others:
            continue
        named = dict(zip(SAME, key, strict=True))
        line = f"{what}: {named['model']}, {named['layout']}, {named['tokens_per_sample']:,} tokens"
        unlike = [
            [
                f"{field} {theirs!r}, not {ours!r}"
                for field, ours, theirs in zip(SAME, key, other, strict=True)
                if ours != theirs
            ]
            for other in others
        ]
        said.append(f"{line}; the nearest {place} has {' and '.join(min(unlike, key=len))}" if unlike else line)
    return said


def _differences(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Why speeds may differ that are not of the program's."""
    pairs = {name: (earlier.get(name), now.get(name)) for name in ("device", "python")}
    packages = [content.get("packages") or {} for content in (earlier, now)]
    for package in sorted({name for found in packages for name in found}):
        pairs[package] = tuple(found.get(package, "not installed") for found in packages)
    return [f"{name}: {then} there, {here} here" for name, (then, here) in pairs.items() if then != here]
