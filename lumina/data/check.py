"""Checking shards: every byte against the indexes, and what no single shard can show."""

import os
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lumina.data.decode import IMAGE_EXTENSIONS, BadSampleError, decode
from lumina.data.find import find_shards
from lumina.data.indexing import build_index
from lumina.data.listing import missing_shards
from lumina.data.processes import Report, run_jobs, usable_cores
from lumina.data.shard_index import DamagedIndexError, ShardIndex, index_path, open_index, parse_header
from lumina.data.sources import LocalSource, source_of
from lumina.data.tarwalk import TarWalk

NAMED = 10  # of each problem; the rest are counted
_COPY = "copy the shard and its index from their source again, or make them anew"
_TEXT = ("txt", "json")


@dataclass(frozen=True)
class Problem:
    """`count` cases of one kind in one place, of which `named` lists the first ten; `mend` is what to do."""

    level: Literal["error", "warning"]
    where: str
    what: str
    count: int
    named: tuple[str, ...]
    mend: str


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
    fails its CRC32, a picture whose header does not read (or, with `decode`, a sample that does not decode), one shard
    under two names. Warnings: a shard without an index or newer than it, keys in several shards, equal pictures under
    different keys, empty captions.

    Args:
        patterns: tar files, folders of tar files, globs.
        decode: decode every sample.
        workers: processes; None for one a core, at most eight.
        progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: a pattern names nothing.
    """
    shards, problems = _shards(patterns)
    total = sum(shard.stat().st_size for shard in shards) * (2 if decode else 1)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    workers = min(usable_cores(), 8) if workers is None else workers
    results = dict(run_jobs(partial(_check_shard, decoded=decode), shards, workers, report))
    found = [results[number] for number in range(len(shards))]
    problems += [problem for result in found for problem in result.problems]
    problems += _across(found)
    problems.sort(key=lambda problem: problem.level)  # errors first; otherwise as found
    return CheckReport(len(shards), sum(len(r.keys) for r in found), sum(r.bytes for r in found), tuple(problems))


def _shards(patterns: Sequence[str | Path]) -> tuple[list[Path], list[Problem]]:
    """The shards that are there, and a problem for those that are not."""
    files, problems = [], []
    for pattern in patterns:
        there, missing = missing_shards(pattern)
        files += there
        if missing:
            what = "missing shard" if len(missing) == 1 else "missing shards"
            mend = "copy them from their source; if they are meant to be gone, delete their indexes and name the others"
            problems.append(Problem("error", str(pattern), what, len(missing), tuple(missing[:NAMED]), mend))
    return [source.path for source in find_shards(files)], problems


def _fresh_index(shard: Path) -> ShardIndex:
    """An index of the shard as it is, nothing being written beside it; `ValueError` if the shard is damaged."""
    with tempfile.TemporaryDirectory(prefix="lumina-check-") as folder:
        link = Path(folder) / shard.name
        link.symlink_to(shard.absolute())
        try:
            build_index(link)
        except ValueError as error:
            raise ValueError(str(error).replace(str(link), shard.name)) from error
        index = open_index(link)
    if index is None:
        raise ValueError(f"shard {shard.name} changed while it was checked")
    return index


@dataclass
class _Result:
    """Of one shard: digests (samples,) of keys and contents, 0 for a sample whose content was not read."""

    shard: Path
    bytes: int
    sha256: str = ""
    problems: list[Problem] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, level: Literal["error", "warning"], what: str, mend: str, named: Sequence[str] = ()) -> None:
        names = tuple(named[:NAMED])
        self.problems.append(Problem(level, self.shard.name, what, max(1, len(named)), names, mend))


def _check_shard(shard: Path, report: Report, decoded: bool) -> _Result:
    result = _Result(shard, shard.stat().st_size)
    try:
        _check_into(result, report, decoded)
    except OSError as error:
        result.add("error", f"it cannot be read ({error.strerror})", "look at the disk and the permissions")
    return result


def _check_into(result: _Result, report: Report, decoded: bool) -> None:
    shard = result.shard
    index = _recorded(shard, result)
    fresh = index is None
    if fresh:
        try:
            index = _fresh_index(shard)
        except ValueError as error:
            result.add("error", str(error).removeprefix(f"shard {shard.name} "), _COPY)
            report(result.bytes * (2 if decoded else 1))
            return
    names = [index.key(row) for row in range(len(index))]
    result.keys = np.array([_digest(key.encode("utf-8", "surrogateescape")) for key in names], np.uint64)
    result.contents = np.zeros(len(names), np.uint64)
    _read_through(index, shard, names, result, report)
    if not fresh and not any(problem.level == "error" for problem in result.problems):
        if result.sha256 != index.header.shard_sha256:
            result.add("error", "its SHA-256 is not that of its index, though all members are", _COPY)
        elif index_path(shard).stat().st_mtime_ns < shard.stat().st_mtime_ns:
            what = "the index is older than the shard, but describes it; training would build it anew"
            result.add("warning", what, f"`touch {index_path(shard)}`, or copy with dates (cp -p, rsync -t)")
    _check_facts(index, names, result, decoded)
    if decoded:
        _decode_all(index, shard, names, result, report)


def _recorded(shard: Path, result: _Result) -> ShardIndex | None:
    path = index_path(shard)
    build = f"build it with `lumina data index {shard}`"
    if not path.is_file():
        result.add("warning", "it has no index, so that only its form could be checked", build)
        return None
    # A shard that was copied without its date is newer than its index; what the index says of it still holds, and tells
    # whether the copy is whole.
    header = parse_header(LocalSource(shard), LocalSource(path))
    if header is not None and header.shard_size != result.bytes:
        result.add("error", f"it has {result.bytes:,} bytes, its index says {header.shard_size:,}", _COPY)
        return None
    try:
        if header is not None:
            return header.open().checked()
    except DamagedIndexError:
        header = None
    result.add("error", "its index is damaged or of another version", f"once the shard is known to be good, {build}")
    return None


def _read_through(index: ShardIndex, shard: Path, names: Sequence[str], result: _Result, report: Report) -> None:
    """One pass over the tar: headers, members, SHA-256, contents."""
    expected = ((row, *member) for row in range(len(index)) for member in index.members(row))
    walk, reported, wrong = TarWalk(source_of(shard)), 0, []
    hashes: dict[int, Any] = defaultdict(partial(blake2b, digest_size=8))
    try:
        for member in walk:
            row, extension, offset, size, crc = next(expected, (-1, "", 0, 0, 0))
            if (member.offset, len(member.data)) != (
                offset,
                size,
            ) or member.name.lower() != f"{names[row]}.{extension}".lower():
                result.add("error", f"its index describes other members, from {member.name} on", _COPY)
                break
            if member.crc != crc:
                wrong.append(f"{names[row]}.{extension}")
            if extension not in _TEXT:
                hashes[row].update(f"{extension}:{size}:".encode())
                hashes[row].update(member.data)
            if walk.size - reported >= 1 << 24:
                report(walk.size - reported)
                reported = walk.size
        else:
            result.sha256 = walk.sha256
            if next(expected, None) is not None:
                result.add("error", "its index describes members that it does not hold", _COPY)
    except ValueError as error:
        result.add("error", str(error).partition(f"{shard} ")[2] or str(error), _COPY)
        wrong = _failing(index, shard, names)
    report(result.bytes - reported)
    if wrong:
        result.add("error", "members that fail their CRC32", _COPY, wrong)
    for row, digest in hashes.items():
        result.contents[row] = int.from_bytes(digest.digest(), "little")


def _failing(index: ShardIndex, shard: Path, names: Sequence[str]) -> list[str]:
    """Members that fail their CRC32, found by the index alone: behind a damaged header the walk cannot go on."""
    return [
        f"{names[row]}.{extension}"
        for row in range(len(index))
        for extension, content, crc in _contents(index, shard, row)
        if zlib.crc32(content) != crc
    ]


def _contents(index: ShardIndex, shard: Path, row: int) -> Iterator[tuple[str, bytes, int]]:
    with shard.open("rb") as stream:
        for extension, offset, size, crc in index.members(row):
            yield extension, os.pread(stream.fileno(), size, offset), crc


def _check_facts(index: ShardIndex, names: Sequence[str], result: _Result, decoded: bool) -> None:
    empty = [names[row] for row in np.flatnonzero(index.columns["caption_length"] == 0).tolist()]
    if empty:
        result.add(
            "warning", "captions that are empty or do not read", "write captions, or leave the samples out", empty
        )
    unread = [
        names[row]
        for row in np.flatnonzero(index.columns["height"] == 0).tolist()
        if any(member[0] in IMAGE_EXTENSIONS for member in index.members(row))
    ]
    if unread and not decoded:
        result.add("error", "pictures whose header does not read", "leave them out when making the shards", unread)


def _decode_all(index: ShardIndex, shard: Path, names: Sequence[str], result: _Result, report: Report) -> None:
    failed = []
    for row in range(len(index)):
        contents = {extension: content for extension, content, _ in _contents(index, shard, row)}
        try:
            decode(contents, channels=3, multiple=1)
        except BadSampleError as error:
            failed.append(f"{names[row]} ({error})")
        report(sum(map(len, contents.values())))
    if failed:
        mend = "leave them out when making the shards; training replaces them, up to data.bad_samples"
        result.add("error", "samples that do not decode", mend, failed)


def _across(results: Sequence[_Result]) -> list[Problem]:
    problems, first_with, kept = [], {}, []
    for result in results:
        if result.sha256 and result.sha256 in first_with:
            same = f"it holds the same bytes as {first_with[result.sha256]}"
            problems.append(Problem("error", result.shard.name, same, 1, (), "delete one of them, or name one only"))
        else:
            kept.append(result)
            first_with.setdefault(result.sha256, result.shard.name)
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

    def __init__(self, results: Sequence[_Result]) -> None:
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
            scratch = _Result(path, path.stat().st_size)  # its problems are known already
            self._indexes[shard] = _recorded(path, scratch) or _fresh_index(path)
        key = self._indexes[shard].key(sample - int(self.starts[shard]))
        return f"{key} ({self.results[shard].shard.name})"


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
