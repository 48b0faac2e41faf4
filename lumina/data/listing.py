"""Which shards a pattern names, and which of them are not there."""

import fnmatch
import os
import re
from pathlib import Path

from lumina.data.shard_index import index_path

_INDEX = index_path(Path(".tar")).name


def missing_shards(pattern: str | Path) -> tuple[list[str], list[str]]:
    """(what to open, names of the shards that are missing) for a tar file, a folder of tar files or a glob.

    Missing are shards whose index lies there without them, and numbers left out in a folder. Where nothing can be told
    (an address, or a name that matches nothing) the pattern itself is what to open.
    """
    path = Path(pattern)
    if path.is_dir():
        folder, glob = path, "*.tar"
    else:
        folder, glob = path.parent, path.name
    if "://" in str(pattern) or not folder.is_dir():
        return [str(pattern)], []
    exact = not path.is_dir() and (path.exists() or not any(sign in glob for sign in "*?["))
    names = os.listdir(folder)
    tars = {name for name in names if name.endswith(".tar")}
    indexed = {name.removesuffix(_INDEX) + ".tar" for name in names if name.endswith(_INDEX)}
    named = {name for name in tars | indexed if (name == glob if exact else fnmatch.fnmatchcase(name, glob))}
    missing = named - tars
    if path.is_dir():
        missing |= _gaps(named)
    if not named:
        return [str(pattern)], []
    return sorted(str(folder / name) for name in named & tars), sorted(missing)


def _gaps(tars: set[str]) -> set[str]:
    numbers: dict[tuple[str, int], set[int]] = {}
    for tar in tars:
        if match := re.fullmatch(r"(.*?)(\d+)\.tar", tar):
            numbers.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    return {
        f"{prefix}{number:0{digits}d}.tar"
        for (prefix, digits), there in numbers.items()
        for number in set(range(min(there), max(there))) - there
    }
