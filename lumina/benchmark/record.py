"""What every record of measurements says about itself, and how it is written."""

import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "flash-attn", "apex", "liger-kernel", "numpy")


def device_of(name: str | None) -> torch.device:
    """The device of this name; unless one is named, a GPU if there is one.

    Raises:
        ValueError: for one that is not here.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device is {name}; measured is on cuda or cpu")
    return device


def surroundings(device: torch.device) -> dict[str, Any]:
    """Date, hardware, versions and command."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": hardware(device),
        "python": platform.python_version(),
        "packages": versions(),
        "command": shlex.join(["lumina", *sys.argv[1:]]),
    }


def hardware(device: torch.device) -> str:
    """In words."""
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors, "
        f"sm_{found.major}{found.minor}, CUDA {torch.version.cuda}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or f"{os.cpu_count()} processors"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of the packages that are installed, of those that matter."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def heading(facts: dict[str, Any]) -> str:
    """Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return f"{facts['date']}, {facts['device']}. Python {facts['python']}, {packages}.\n\n    {facts['command']}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, aligned so that it reads as text."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def check_writable(path: str | None, option: str = "--out") -> None:
    """Refuse a place for results, which `option` names, before anything is measured.

    Raises:
        ValueError: if `path` is there, or its folder is not.
    """
    if path is None:
        return
    if Path(path).exists():
        raise ValueError(f"{option} {path} exists; name a file that does not")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {folder} cannot be written to")


class Results:
    """Rows (dataclasses) as they come, and why others are missing; in a JSON file after each, if one is named."""

    def __init__(self, path: str | None, facts: dict[str, Any]):
        self.path, self.facts = path, facts
        self.rows: list[Any] = []
        self.missing: list[str] = []

    def add(self, what: str, rows: Iterable[Any]) -> None:
        """Keep what `rows` gives; if it fails half-way (memory, a package's error), why."""
        try:
            for row in rows:
                self.rows.append(row)
        except Exception as error:  # noqa: BLE001 - it stands in the results; the other measurements are worth having
            lines = str(error).splitlines() or [""]
            self._miss(f"{what}: {type(error).__name__}: {lines[0]}")
        self._write()

    def add_failure(self, what: str, why: str) -> None:
        """Keep that there is no row of it, and why."""
        self._miss(f"{what}: {why}")
        self._write()

    def _miss(self, line: str) -> None:
        self.missing.append(line)
        print(line, file=sys.stderr)

    def _write(self) -> None:
        if self.path is not None:
            Path(self.path).write_text(json.dumps(self.content(), indent=1) + "\n")

    def content(self) -> dict[str, Any]:
        """Of the file."""
        return self.facts | {"rows": [dataclasses.asdict(row) for row in self.rows], "missing": self.missing}

    def said(self) -> str:
        """Why rows are missing, a line each; empty if none is."""
        return "".join(f"\nNot measured: {line}" for line in self.missing)
