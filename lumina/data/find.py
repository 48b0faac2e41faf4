"""From what `data.shards` says to the list of shards."""

import fnmatch
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lumina.data.remote import RemoteSource, file_system
from lumina.data.shard_index import SUFFIX
from lumina.data.sources import LocalSource, Retry, Source, is_url, source_of

_MOST_IN_BRACES = 1_000_000


def find_shards(
    patterns: Sequence[str | Path], *, pipe_programs: Sequence[str] = (), retry: Retry | None = None
) -> list[Source]:
    """The shards that `patterns` name, sorted by file name, each once.

    Args:
        patterns: tar files, folders of them, and globs in the last part of a path; all of them local or as URLs
            (folders and globs where the file system can list); `pipe:COMMAND`. In each, `{000..019}` stands for the
            numbers and `{a,b}` for the words. A path that exists as it is written is taken so.
        pipe_programs: programs that `pipe:` may run.
        retry: for URLs; the defaults of `Retry` if None.

    Raises:
        ValueError: a pattern names nothing, or a shard is missing: its index lies there without it, or the
            numbers in a folder have a gap. Whether a URL of one shard exists is not asked.
    """
    found: dict[str, Source] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            if isinstance(name, str) and name.startswith("pipe:"):
                sources = [source_of(name, pipe_programs=pipe_programs)]
            elif isinstance(name, str) and is_url(name):
                sources = _remote(name, retry)
            else:
                sources = _local(name)
            found |= {source.location: source for source in sources}
    return sorted(found.values(), key=lambda source: (source.name, source.location))


def _expanded(pattern: str | Path) -> Iterator[str | Path]:
    text = str(pattern)
    if "{" not in text or (not is_url(text) and Path(text).exists()):
        yield pattern
        return
    choices = []
    for part in re.split(r"(\{[^{}]*\})", text):
        choices.append(_choices(part, text) if part.startswith("{") and part.endswith("}") else [part])
    count = 1
    for options in choices:
        count *= len(options)
    if count > _MOST_IN_BRACES:
        raise ValueError(f"data.shards: {text} names {count} shards, more than {_MOST_IN_BRACES}")
    for parts in itertools.product(*choices):
        yield "".join(parts)


def _choices(braces: str, text: str) -> Sequence[str]:
    inside = braces[1:-1]
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(match[1]), int(match[2])
        if first > last or last - first >= _MOST_IN_BRACES:
            raise ValueError(f"data.shards: {braces} in {text} must count up, by at most {_MOST_IN_BRACES}")
        digits = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 1
        return [f"{number:0{digits}d}" for number in range(first, last + 1)]
    if "," in inside:
        return inside.split(",")
    raise ValueError(
        f"data.shards: {braces} in {text} is neither a range such as {{000..019}} nor a list such as {{a,b}}"
    )


def _local(pattern: str | Path) -> list[Source]:
    path = Path(str(pattern).removeprefix("file://"))
    if path.is_file():
        return [LocalSource(path.resolve())]
    if path.is_dir():
        folder, glob = path, "*.tar"
    elif any(sign in path.name for sign in "*?["):
        folder, glob = path.parent, path.name
    else:
        raise ValueError(f"data.shards: {pattern} is missing; give a tar file, a folder of tar files or a glob")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    tars = _tars(str(pattern), str(folder), glob, names, whole_folder=path.is_dir())
    return [LocalSource((folder / name).resolve()) for name in tars]


def _remote(url: str, retry: Retry | None) -> list[Source]:
    # A "?" starts the query of a link, so it is no wildcard here.
    address, _, query = url.partition("?")
    folder, _, name = address.rpartition("/")
    if name.endswith(".tar") and not any(sign in name for sign in "*["):
        return [source_of(url, retry=retry)]
    if query:
        raise ValueError(f"data.shards: {_said(url)} names no .tar file, and a folder or glob cannot have a query")
    whole_folder = not any(sign in name for sign in "*[")
    if whole_folder:
        folder, name = address.rstrip("/"), "*.tar"
    tars = _tars(_said(url), _said(folder), name, _listed(folder, url, retry), whole_folder)
    return [source_of(f"{folder}/{tar}", retry=retry) for tar in tars]


def _said(url: str) -> str:
    return str(source_of(url))


def _listed(folder: str, url: str, retry: Retry | None) -> list[str]:
    files = file_system(folder)
    source = source_of(folder, retry=retry)
    assert isinstance(source, RemoteSource)
    try:
        paths = source.retrying(lambda _: files.ls(folder + "/", detail=False))
    except ValueError as error:
        raise ValueError(
            f"data.shards: {_said(url)} cannot be listed ({error}); "
            "name the shards one by one, or by a range such as shard-{000000..000099}.tar"
        ) from error
    return sorted({str(path).rstrip("/").partition("?")[0].rpartition("/")[2] for path in paths})


def _tars(pattern: str, folder: str, glob: str, names: Sequence[str], whole_folder: bool) -> list[str]:
    """The tar files among `names` that `glob` matches."""
    tars = [name for name in names if name.endswith(".tar") and fnmatch.fnmatchcase(name, glob)]
    if not tars:
        raise ValueError(f"data.shards: {pattern} matches no .tar file")
    there = set(tars)
    for name in names:
        tar = name.removesuffix(SUFFIX) + ".tar"
        if name.endswith(SUFFIX) and fnmatch.fnmatchcase(tar, glob) and tar not in there:
            raise ValueError(
                f"shard {folder}/{tar} is missing: its index is there without it; restore it, or delete both"
            )
    if whole_folder:
        _refuse_gaps(folder, tars)
    return tars


def _refuse_gaps(folder: str, tars: Sequence[str]) -> None:
    numbered: dict[tuple[str, int], list[int]] = {}
    for tar in tars:
        if match := re.fullmatch(r"(.*?)(\d+)\.tar", tar):
            numbered.setdefault((match[1], len(match[2])), []).append(int(match[2]))
    for (prefix, digits), numbers in numbered.items():
        count = max(numbers) - min(numbers) + 1
        if missing := count - len(set(numbers)):
            there = set(numbers)
            first = next(number for number in range(min(numbers), max(numbers)) if number not in there)
            raise ValueError(
                f"shard {folder}/{prefix}{first:0{digits}d}.tar is missing ({missing} of {count} numbers are); "
                "restore it, or name the shards you mean by a glob"
            )
