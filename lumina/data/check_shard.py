"""Checking one shard: every byte against its index, and with `decoded` every sample."""

import os
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lumina.data.decode import BadSampleError, verify
from lumina.data.indexing import build_index
from lumina.data.processes import Report
from lumina.data.shard_index import (
    KINDS,
    UNREADABLE,
    DamagedIndexError,
    ShardIndex,
    index_path,
    open_index,
    parse_header,
)
from lumina.data.sources import LocalSource, source_of
from lumina.data.tarwalk import TarWalk

NAMED = 10  # of each problem; the rest are counted
_COPY = "copy the shard and its index from their source again, or make them anew"
_LEAVE = "leave them out when making the shards; training replaces them, up to data.bad_samples"
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


def fresh_index(shard: Path) -> ShardIndex:
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
class ShardResult:
    """What checking a shard found.

    Attributes:
        name: how it is called in problems.
        keys, contents: uint64 (samples,), digests; 0 for a sample whose content was not read.
    """

    shard: Path
    name: str
    bytes: int
    sha256: str = ""
    problems: list[Problem] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, level: Literal["error", "warning"], what: str, mend: str, named: Sequence[str] = ()) -> None:
        names = tuple(named[:NAMED])
        self.problems.append(Problem(level, self.name, what, max(1, len(named)), names, mend))


def check_shard(job: tuple[Path, str], report: Report, decoded: bool) -> ShardResult:
    """Check a shard, given with what to call it; with `decoded` its bytes are reported twice."""
    shard, name = job
    result = ShardResult(shard, name, shard.stat().st_size)
    try:
        _check_into(result, report, decoded)
    except OSError as error:
        result.add("error", f"it cannot be read ({error.strerror})", "look at the disk and the permissions")
    return result


def _check_into(result: ShardResult, report: Report, decoded: bool) -> None:
    shard = result.shard
    index = recorded_index(shard, result)
    fresh = index is None
    if fresh:
        try:
            index = fresh_index(shard)
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


def recorded_index(shard: Path, result: ShardResult) -> ShardIndex | None:
    """The index beside a shard, even if it is older; None if it cannot be that of the shard, which `result` is told."""
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


def _read_through(index: ShardIndex, shard: Path, names: Sequence[str], result: ShardResult, report: Report) -> None:
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


def _check_facts(index: ShardIndex, names: Sequence[str], result: ShardResult, decoded: bool) -> None:
    empty = [names[row] for row in np.flatnonzero(index.columns["caption_length"] == 0).tolist()]
    if empty:
        result.add(
            "warning", "captions that are empty or do not read", "write captions, or leave the samples out", empty
        )
    columns = index.columns
    # Sound has no height; a duration it always has.
    bad = (columns["height"] == 0) & ((columns["kind"] != KINDS.index("audio")) | (columns["duration"] == 0))
    unread = [names[row] for row in np.flatnonzero(bad).tolist()]
    if unread and not decoded:
        result.add("error", "samples whose header does not read", _LEAVE, unread)
    unread = [names[row] for row in np.flatnonzero(columns["label"] == UNREADABLE).tolist()]
    if unread and not decoded:
        result.add("error", "samples whose .json, or the label in it, does not read", _LEAVE, unread)


def _decode_all(index: ShardIndex, shard: Path, names: Sequence[str], result: ShardResult, report: Report) -> None:
    failed, left = [], result.bytes
    for row in range(len(index)):
        contents = {extension: content for extension, content, _ in _contents(index, shard, row)}
        try:
            verify(contents)
        except BadSampleError as error:
            failed.append(f"{names[row]} ({error})")
        left -= (size := sum(map(len, contents.values())))
        report(size)
    report(left)  # headers and padding
    if failed:
        result.add("error", "samples that do not decode", _LEAVE, failed)


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
