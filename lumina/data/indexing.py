"""Making indexes: reading shards once from end to end, in several processes."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lumina.data.decode import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    BadSampleError,
    caption_of,
    label_of,
    parse_json,
    probe,
)
from lumina.data.find import find_shards
from lumina.data.processes import Report, run_jobs
from lumina.data.shard_index import (
    COLUMNS,
    KINDS,
    MEMBER_COLUMNS,
    SAMPLE_COLUMNS,
    UNREADABLE,
    index_path,
    index_path_in,
    open_index,
    write_index,
)
from lumina.data.sources import LocalSource, MissingSourceError, Retry, Source, source_of
from lumina.data.tarwalk import Member, TarWalk

KIND_OF_EXTENSION = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(VIDEO_EXTENSIONS, "video"),
    **dict.fromkeys(AUDIO_EXTENSIONS, "audio"),
    "npy": "image",  # or video, as its axes say
    "latent.npy": "latent",
}
_MOST_FAILURES = 20


def build_index(shard: str | Path | Source, index_dir: str | Path | None = None) -> Path:
    """Read a shard once from end to end and write its index: beside a local shard, else into `index_dir`.

    Returns:
        Path of the index. It appears complete or not at all.

    Raises:
        ValueError: the shard is missing, damaged (truncated, a hole, a broken header), holds a key or extension
            twice, or a sample without its picture, video, sound or latent, or without a caption that others have;
            the shard and the key are named. A picture that does not decode is no error here: its size is noted as 0
            and the loader replaces it. Also where the index cannot be written, or has no place.
    """
    source = source_of(shard)
    try:
        before = source.identity()
        changed_ns = source.stat().st_mtime_ns if isinstance(source, LocalSource) else 0
    except MissingSourceError as error:
        hint = "; give the path of a tar file" if isinstance(source, LocalSource) else ""
        raise ValueError(f"shard {error}{hint}") from error
    targets = _targets(source, index_dir)
    try:
        scanned = _scan(source)
        after = source.identity()
    except OSError as error:
        raise ValueError(f"shard {source} cannot be read ({error.strerror or error})") from error
    finally:
        source.close()
    if before != after:
        raise ValueError(f"shard {source} changed while it was indexed; index it again when it is complete")
    for number, target in enumerate(targets):
        beside = index_dir is None or target.parent != Path(index_dir)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_index(
                target,
                scanned.columns,
                size=scanned.size,
                sha256=scanned.sha256,
                # Beside a local shard its age tells; so an index does not depend on when its shard was written.
                identity=None if beside else before,
                extensions=scanned.extensions,
            )
            if target.stat().st_mtime_ns < changed_ns:  # the shard is from a clock that is ahead of ours
                os.utime(target, ns=(changed_ns, changed_ns))
            return target
        except OSError as error:
            if number + 1 < len(targets):
                continue
            where = "beside it" if beside else f"to {target.parent}"
            raise ValueError(
                f"the index of {source} cannot be written {where} ({error.strerror}); "
                "run `lumina data index` where the folder is writable, or give a folder for indexes (--index-dir)"
            ) from error
    raise AssertionError("unreachable")


def _targets(source: Source, index_dir: str | Path | None) -> list[Path]:
    """Where an index may be put, the best first."""
    targets = [index_path(source.path)] if isinstance(source, LocalSource) else []
    if index_dir is not None:
        targets.append(index_path_in(index_dir, source))
    if not targets:
        raise ValueError(
            f"shard {source} has no index beside it, and nothing can be put there; "
            "give a local folder for indexes (`lumina data index --index-dir DIR`)"
        )
    return targets


def index_shards(
    patterns: Sequence[str | Path],
    progress: Callable[[int, int], object] | None = None,
    *,
    workers: int = 1,
    index_dir: str | Path | None = None,
    pipe_programs: Sequence[str] = (),
    retry: Retry | None = None,
) -> int:
    """Build the indexes that are missing, out of date or damaged, as `lumina data index` does.

    It may be interrupted and run again, or run on several hosts at once: an index that is there is not built again.

    Args:
        patterns, pipe_programs, retry: as in `find_shards`.
        progress: called with (shards done, shards in all) after each shard.
        workers: processes that index; with 1, this one. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        index_dir: folder for the indexes that cannot lie beside their shards.

    Returns:
        Number of samples in all the shards.

    Raises:
        ValueError: a shard is missing or damaged, or two hold the same bytes. The others are indexed all the same,
            until twenty have failed.
        RuntimeError: a process died.
    """
    if workers < 1:
        raise ValueError(f"shards are indexed by at least 1 worker, not {workers}")
    shards = find_shards(patterns, pipe_programs=pipe_programs, retry=retry)
    if workers > 1:
        # Several hosts that index one folder should not all be at the same shard.
        random.SystemRandom().shuffle(shards)
    samples, failures, first_with = 0, {}, {}
    results = run_jobs(partial(_index_one, index_dir=index_dir), shards, workers, lambda _: None)
    for done, (number, result) in enumerate(results, 1):
        if isinstance(result, str):
            failures[shards[number].name, shards[number].location] = result
            if len(failures) == _MOST_FAILURES:
                break
        else:
            samples += result[0]
            first_with.setdefault(result[1], []).append(shards[number])
        if progress is not None:
            progress(done, len(shards))
    if failures:
        others = len(failures) - 1
        more = f" ({others} more of {len(shards)} shards cannot be indexed)" if others else ""
        raise ValueError(failures[min(failures)] + more)
    for same in first_with.values():
        if len(same) > 1:
            first, second = sorted(map(str, same))[:2]
            raise ValueError(f"shards {first} and {second} hold the same bytes; name one of them")
    return samples


def _index_one(shard: Source, _: Report, index_dir: str | Path | None) -> tuple[int, str] | str:
    """The number of its samples and its SHA-256, or what is wrong with it."""
    try:
        opened = open_index(shard, index_dir)
        if opened is None:
            build_index(shard, index_dir)
            opened = open_index(shard, index_dir)
    except ValueError as error:
        return str(error)
    if opened is None:
        return f"shard {shard} changed while it was indexed; index it again when it is complete"
    return len(opened), opened.header.shard_sha256


@dataclass(frozen=True)
class _Scanned:
    size: int
    sha256: str
    extensions: tuple[str, ...]
    columns: Mapping[str, np.ndarray]


@dataclass
class _Facts:
    kind: int = 0
    height: int = 0
    width: int = 0
    frames: int = 1
    duration: float = 0.0
    caption_length: int = -1
    label: int = -1


def _scan(source: Source) -> _Scanned:
    walk = TarWalk(source)
    extensions: dict[str, int] = {}
    lists: dict[str, list[float]] = {name: [] for name in (*SAMPLE_COLUMNS, *MEMBER_COLUMNS)}
    key_start, member_start, key_bytes = [0], [0], bytearray()
    seen: set[str] = set()
    uncaptioned: str | None = None
    for key, members in _grouped(walk, source):
        if key in seen:
            raise ValueError(
                f"shard {source} holds the key {key} twice, the second time at byte {members[0][1].offset}"
            )
        seen.add(key)
        facts = _facts(source, key, {extension: member.data for extension, member in members})
        if facts.caption_length == -1:
            uncaptioned = uncaptioned or key
        for name in SAMPLE_COLUMNS:
            lists[name].append(getattr(facts, name))
        for extension, member in members:
            row = extensions.setdefault(extension, len(extensions)), member.offset, len(member.data), member.crc
            for name, value in zip(MEMBER_COLUMNS, row, strict=True):
                lists[name].append(value)
        key_bytes += key.encode("utf-8", "surrogateescape")
        key_start.append(len(key_bytes))
        member_start.append(len(lists["offset"]))
    if not seen:
        raise ValueError(f"shard {source} holds no samples")
    captioned = max(lists["caption_length"]) >= 0
    if uncaptioned is not None and captioned:
        noun = _NOUNS[KINDS[lists["kind"][0]]]
        raise ValueError(
            f"sample {uncaptioned} of shard {source} has a {noun} and no caption while others have one; "
            "was the shard cut between two members?"
        )
    # A caption that might stand in a broken .json is taken for what the others have: the sample is bad, not the shard.
    unread = -1 if uncaptioned is not None else 0
    lists["caption_length"] = [unread if length == UNREADABLE else length for length in lists["caption_length"]]
    columns = {name: np.array(values, dtype=COLUMNS[name]) for name, values in lists.items()}
    columns |= {"key_start": np.array(key_start, np.int64), "member_start": np.array(member_start, np.int64)}
    columns["key_bytes"] = np.frombuffer(bytes(key_bytes), np.uint8)
    return _Scanned(walk.size, walk.sha256, tuple(extensions), columns)


def _grouped(walk: TarWalk, source: Source) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """(key, [(extension, member), …]) for each run of members of one key; the key ends at the first dot of the name."""
    key, members = "", []
    for member in walk:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not dot:
            raise ValueError(f"member {member.name} of shard {source} is not named KEY.EXTENSION")
        if members and folder + slash + stem != key:
            yield key, members
            members = []
        key = folder + slash + stem
        if any(extension == other for other, _ in members):
            raise ValueError(f"sample {key} of shard {source} has .{extension} twice, again at byte {member.offset}")
        members.append((extension, member))
    if members:
        yield key, members


def _facts(source: Source, key: str, contents: Mapping[str, bytes]) -> _Facts:
    kind = _kind(source, key, contents)
    facts = _Facts(kind=KINDS.index(kind))
    # What cannot be read keeps its default: the sample is bad, which the loader finds, counts and mends.
    try:
        found = probe(contents)
        facts.kind, facts.height, facts.width = KINDS.index(found.kind), found.height, found.width
        facts.frames, facts.duration = found.frames, found.duration
    except BadSampleError:
        facts.height = facts.width = 0
    featured = "text.npy" in contents  # features of the caption do for a caption
    try:
        fields = parse_json(contents)
    except BadSampleError:
        facts.caption_length, facts.label = 0 if featured or "txt" in contents else UNREADABLE, UNREADABLE
        return facts
    try:
        caption = caption_of(contents, fields)
        facts.caption_length = len(caption) if caption is not None else 0 if featured else -1
    except BadSampleError:
        facts.caption_length = 0 if "txt" in contents else UNREADABLE
    try:
        label = label_of(fields)
        facts.label = -1 if label is None else label
    except BadSampleError:
        facts.label = UNREADABLE
    if facts.caption_length == facts.label == -1:
        raise ValueError(f"sample {key} of shard {source} has a {_NOUNS[kind]} and neither caption nor label")
    return facts


_NOUNS = {"image": "picture", "video": "video", "audio": "sound", "latent": "latent"}


def _kind(source: Source, key: str, contents: Mapping[str, bytes]) -> str:
    """What a sample is: its latent counts before what that was made of, of which there is one at most."""
    if "latent.npy" in contents:
        return "latent"
    found = [extension for extension in contents if extension in KIND_OF_EXTENSION]
    if len(found) != 1:
        raise ValueError(
            f"sample {key} of shard {source} has {len(found) or 'none'} of {', '.join(KIND_OF_EXTENSION)} "
            f"among {sorted(contents)}; it must have one"
        )
    return KIND_OF_EXTENSION[found[0]]
