"""From what `data.shards` says to the list of shards."""

import fnmatch
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lumina.data.decode import MEDIA
from lumina.data.remote import RemoteSource, file_system
from lumina.data.shard_index import SUFFIX, index_path
from lumina.data.sources import LocalSource, Retry, Source, is_url, source_of

_MOST_IN_BRACES = 1_000_000
_INDEX_ALONE = ": its index is there without it; restore it, or delete both"


@dataclass(frozen=True)
class MissingShard:
    """A shard that is not there: the name of its file, and how that is known and mended, the end of a sentence."""

    folder: str
    name: str
    why: str


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
    shards, missing = look_for_shards(patterns, pipe_programs=pipe_programs, retry=retry)
    for shard in missing:
        raise ValueError(f"shard {shard.folder}/{shard.name} is missing{shard.why}")
    return shards


def look_for_shards(
    patterns: Sequence[str | Path], *, pipe_programs: Sequence[str] = (), retry: Retry | None = None
) -> tuple[list[Source], list[MissingShard]]:
    """As `find_shards`, with the shards that are missing told in place of an error."""
    found: dict[str, Source] = {}
    missing: dict[MissingShard, None] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            if isinstance(name, str) and name.startswith("pipe:"):
                sources, gone = [source_of(name, pipe_programs=pipe_programs)], []
            elif isinstance(name, str) and is_url(name):
                sources, gone = _remote(name, retry)
            else:
                sources, gone = _local(name)
            found |= {source.location: source for source in sources}
            missing |= dict.fromkeys(gone)
    return sorted(found.values(), key=lambda source: (source.name, source.location)), list(missing)


def folders_of_shards(folder: Path) -> list[Path]:
    """Those that hold shards, of a folder and all below it but the hidden ones."""
    found = []
    for above, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if any(name.endswith((".tar", SUFFIX)) for name in names):
            found.append(Path(above))
    return found


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


def _local(pattern: str | Path) -> tuple[list[Source], list[MissingShard]]:
    path = Path(str(pattern).removeprefix("file://"))
    if path.is_file():
        if path.suffix[1:].lower() in MEDIA:
            raise ValueError(f"data.shards: {pattern} is no shard; make shards of such files with `lumina data folder`")
        return [LocalSource(path.resolve())], []
    if path.is_dir():
        folder, glob = path, "*.tar"
    elif any(sign in path.name for sign in "*?["):
        folder, glob = path.parent, path.name
    elif index_path(path).is_file():
        return [], [MissingShard(str(path.parent), path.name, _INDEX_ALONE)]
    else:
        raise ValueError(f"data.shards: {pattern} is missing; give a tar file, a folder of tar files or a glob")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    tars, missing = _tars(str(folder), glob, names, whole_folder=path.is_dir())
    if not tars and not missing:
        below = folders_of_shards(path) if path.is_dir() else []
        hint = f"; name the folders in it that hold some: {', '.join(map(str, below[:4]))}" if below else ""
        raise ValueError(f"data.shards: {pattern} matches no .tar file{hint}{', …' if len(below) > 4 else ''}")
    return [LocalSource((folder / name).resolve()) for name in tars], missing


def _remote(url: str, retry: Retry | None) -> tuple[list[Source], list[MissingShard]]:
    # A "?" starts the query of a link, so it is no wildcard here.
    address, _, query = url.partition("?")
    folder, _, name = address.rpartition("/")
    if name.endswith(".tar") and not any(sign in name for sign in "*["):
        return [source_of(url, retry=retry)], []
    if query:
        raise ValueError(f"data.shards: {_said(url)} names no .tar file, and a folder or glob cannot have a query")
    whole_folder = not any(sign in name for sign in "*[")
    if whole_folder:
        folder, name = address.rstrip("/"), "*.tar"
    tars, missing = _tars(_said(folder), name, _listed(folder, url, retry), whole_folder)
    if not tars and not missing:
        raise ValueError(f"data.shards: {_said(url)} matches no .tar file")
    return [source_of(f"{folder}/{tar}", retry=retry) for tar in tars], missing


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


def _tars(folder: str, glob: str, names: Sequence[str], whole_folder: bool) -> tuple[list[str], list[MissingShard]]:
    """The tar files among the `names` of a folder's files that `glob` matches, and those that should be there."""
    tars = [name for name in names if name.endswith(".tar") and fnmatch.fnmatchcase(name, glob)]
    indexed = [name.removesuffix(SUFFIX) + ".tar" for name in names if name.endswith(SUFFIX)]
    there = set(tars)
    alone = [name for name in indexed if name not in there and fnmatch.fnmatchcase(name, glob)]
    missing = [MissingShard(folder, name, _INDEX_ALONE) for name in alone]
    if whole_folder:
        missing += _gaps(folder, [*tars, *alone])
    return tars, missing


def _gaps(folder: str, tars: Sequence[str]) -> list[MissingShard]:
    numbered: dict[tuple[str, int], set[int]] = {}
    for tar in tars:
        if match := re.fullmatch(r"(.*?)(\d+)\.tar", tar):
            numbered.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    missing = []
    for (prefix, digits), there in numbered.items():
        numbers = range(min(there), max(there) + 1)
        gap = len(numbers) - len(there)
        why = f" ({gap} of {len(numbers)} numbers are); restore it, or name the shards you mean by a glob"
        # A stray number, as of a date, must not become a list of a billion.
        absent = itertools.islice((number for number in numbers if number not in there), _MOST_IN_BRACES)
        missing += [MissingShard(folder, f"{prefix}{number:0{digits}d}.tar", why) for number in absent]
    return missing
