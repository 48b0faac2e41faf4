"""Checking shards: each by itself, and what no single shard can show."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.check_shard import NAMED, Problem, ShardResult, check_shard, fresh_index, recorded_index
from lumina.data.find import folders_of_shards, look_for_shards
from lumina.data.processes import run_jobs
from lumina.data.shard_index import ShardIndex
from lumina.data.sources import LocalSource


@dataclass(frozen=True)
class CheckReport:
    """What was read, and what is wrong with it."""

    shards: int
    samples: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> int:
        """Problems, of which training would suffer."""
        return sum(problem.level == "error" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"errors": self.errors, "warnings": len(self.problems) - self.errors}
        return {"shards": self.shards, "samples": self.samples, "bytes": self.bytes, **counts} | {
            "problems": [asdict(problem) for problem in self.problems]
        }

    def as_text(self) -> str:
        """Problems with their mends, and a last line that sums up."""
        width = max((len(problem.where) for problem in self.problems), default=0)
        lines = []
        for problem in self.problems:
            number = f"{problem.count:,} × " if problem.count > 1 else ""
            names = ": " + ", ".join(problem.named) if problem.named else ""
            more = ", …" if problem.count > len(problem.named) > 0 else ""
            lines.append(f"{problem.level:7}  {problem.where:{width}}  {number}{problem.what}{names}{more}")
            lines.append(f"{'mend':>7}  {'':{width}}  {problem.mend}")
        warnings = len(self.problems) - self.errors
        number = "1 shard" if self.shards == 1 else f"{self.shards:,} shards"
        found = f"errors: {self.errors}, warnings: {warnings}" if self.problems else "nothing is wrong"
        lines.append(f"{self.samples:,} samples in {number} ({self.bytes:,} bytes) checked; {found}")
        return "\n".join(lines)


def check_shards(
    patterns: Sequence[str | Path],
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> CheckReport:
    """Read shards from end to end and report all that is wrong. Nothing is changed.

    Errors: a missing shard, a shard of another size or SHA-256 than its index says, a damaged header, a member that
    fails its CRC32, a sample whose header does not read (or, with `decode`, that does not decode), one shard under two
    names. Warnings: a shard without an index or newer than it, keys in several shards, equal files under different
    keys, empty captions.

    Args:
        patterns: as in `find_shards`, local; a folder without shards stands for all below it that have some.
        decode: decode every sample, of videos every frame.
        workers: processes; None for one a core, at most eight.
        progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: a pattern names nothing, or what is no local file.
    """
    shards, problems = _shards(patterns)
    total = sum(shard.stat().st_size for shard, _ in shards) * (2 if decode else 1)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    results = dict(run_jobs(partial(check_shard, decoded=decode), shards, workers, report))
    found = [results[number] for number in range(len(shards))]
    problems += [problem for result in found for problem in result.problems]
    problems += _across(found)
    problems.sort(key=lambda problem: problem.level)  # errors first; otherwise as found
    return CheckReport(len(shards), sum(len(r.keys) for r in found), sum(r.bytes for r in found), tuple(problems))


def _shards(patterns: Sequence[str | Path]) -> tuple[list[tuple[Path, str]], list[Problem]]:
    """The shards that are there, each with what to call it, and problems for those that are not."""
    sources, missing = look_for_shards([place for pattern in patterns for place in _places(pattern)])
    for source in sources:
        if not isinstance(source, LocalSource):
            raise ValueError(f"{source} is no local file; copy the shards here to check them")
    paths = [source.path for source in sources]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        folder = os.path.commonpath(paths)
        names = [os.path.relpath(path, folder) for path in paths]
    problems = []
    for folder in dict.fromkeys(shard.folder for shard in missing):
        gone = sorted(shard.name for shard in missing if shard.folder == folder)
        what = "missing shard" if len(gone) == 1 else "missing shards"
        mend = "copy them from their source; if they are meant to be gone, delete their indexes and name the others"
        problems.append(Problem("error", folder, what, len(gone), tuple(gone[:NAMED]), mend))
    return list(zip(paths, names, strict=True)), problems


def _places(pattern: str | Path) -> list[str | Path]:
    """The pattern, or the folders that one without shards stands for."""
    folder = Path(pattern)
    found = folders_of_shards(folder) if folder.is_dir() else []
    return [pattern] if folder in found or not found else list(found)


def _across(results: Sequence[ShardResult]) -> list[Problem]:
    problems, first_with, kept = [], {}, []
    for result in results:
        if result.sha256 and result.sha256 in first_with:
            same = f"it holds the same bytes as {first_with[result.sha256]}"
            problems.append(Problem("error", result.name, same, 1, (), "delete one of them, or name one only"))
        else:
            kept.append(result)
            first_with.setdefault(result.sha256, result.name)
    if not kept:
        return problems
    keys = np.concatenate([result.keys for result in kept])
    contents = np.concatenate([result.contents for result in kept])
    names = _Names(kept)
    order = np.argsort(keys, kind="stable")
    later = order[1:][keys[order][1:] == keys[order][:-1]]
    if len(later):
        named = names.pairs(keys, later)
        what, mend = "keys in more than one shard", "none is needed for training; look whether a shard was made twice"
        problems.append(Problem("warning", "all shards", what, len(later), named, mend))
    # Equal pictures under one key are that sample again, which is said already.
    _, distinct = np.unique(np.stack([contents, keys], 1), axis=0, return_index=True)
    distinct = np.sort(distinct[contents[distinct] != 0])
    order = distinct[np.argsort(contents[distinct], kind="stable")]
    later = order[1:][contents[order][1:] == contents[order][:-1]]
    if len(later):
        named = names.pairs(contents, later)
        mend = "leave them out when making the shards, unless they are meant"
        problems.append(Problem("warning", "all shards", "files equal to that of another key", len(later), named, mend))
    return problems


class _Names:
    """What samples are called, looked up for the few that are named: all keys together would not fit in memory."""

    def __init__(self, results: Sequence[ShardResult]) -> None:
        self.results = results
        self.starts = np.cumsum([0, *(len(result.keys) for result in results)])
        self._indexes: dict[int, ShardIndex] = {}

    def pairs(self, digests: np.ndarray, later: np.ndarray) -> tuple[str, ...]:
        """ "LATER = FIRST" for the first ten, by number of the sample."""
        chosen = np.sort(later)[:NAMED].tolist()
        return tuple(f"{self.of(i)} = {self.of(int(np.argmax(digests == digests[i])))}" for i in chosen)

    def of(self, sample: int) -> str:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        if shard not in self._indexes:
            path = self.results[shard].shard
            scratch = ShardResult(path, path.name, path.stat().st_size)  # its problems are known already
            self._indexes[shard] = recorded_index(path, scratch) or fresh_index(path)
        key = self._indexes[shard].key(sample - int(self.starts[shard]))
        return f"{key} ({self.results[shard].name})"
