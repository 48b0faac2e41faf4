"""The data description of the public Lumina-T2X: YAML that names JSON files of pictures and prompts → shards."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from lumina.data.recipes.items import Item, Keys, Skips, caption_fault
from lumina.data.recipes.making import Items, Layout, Progress, Summary, make_shards
from lumina.data.recipes.table import file_at, rows

_PATHS = ("path", "image", "image_url")
_KEYS = ("path", "root", "ratio", "type")


@dataclass(frozen=True)
class Entry:
    """One of META: `items` is its JSON file, `root` the folder of its pictures, `folder` that of its shards."""

    folder: str
    items: Path
    root: Path
    ratio: float
    type: str


def lumina_to_shards(
    config: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    skip_missing: bool = False,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the pictures of a public data description into shards, byte for byte, in the order of its items.

    `config` is YAML: META, a list of {path, root, ratio, type}. `path` is a .json (a list) or .jsonl, also with .gz, of
    items with "path" and "prompt", or with "image" or "image_url" and "conversations", of which the first turn from
    "gpt" is the caption, without <image> tags. Paths of items are relative to `root`, and `path` and `root` to the
    folder of `config`. Of one entry the shards lie in `out`; of several each has a sub folder.

    A `ratio` below 1 keeps that share of the items, each by a hash of its content and the seed. One above 1 repeats
    nothing: OUT/weights.json lists {folder, type, weight} of each entry, of which `blend` makes the sets of a run. The
    weight is the number of samples, times the ratio where that is above 1: so each item comes as often as described.

    Args:
        config: YAML file.
        out: a new or empty folder.
        seed: chooses the share that a ratio below 1 keeps.
        skip_missing: leave out items whose file is missing or that are wrong otherwise, instead of refusing.
        layout: how samples become shards.
        progress: see `making.Progress`.

    Raises:
        ValueError: the description or a JSON file cannot be read, items are wrong, or as `make_shards`.
    """
    config = Path(config).resolve()
    entries = read_entries(config)

    def source(entry: Entry) -> Items:
        return lambda skips: _items(entry, seed, skip_missing, skips)

    described = [{"path": str(e.items), "root": str(e.root), "ratio": e.ratio, "type": e.type} for e in entries]

    def documents(samples: Mapping[str, int]) -> dict[str, Any]:
        weights = [samples[entry.folder] * max(entry.ratio, 1.0) for entry in entries]
        named = zip(entries, weights, strict=True)
        return {"weights.json": [{"folder": e.folder or ".", "type": e.type, "weight": weight} for e, weight in named]}

    return make_shards(
        out,
        {entry.folder: source(entry) for entry in entries},
        arguments={"recipe": "lumina", "META": described, "seed": seed, "skip-missing": skip_missing},
        documents=documents,
        mend="mend them, or leave them out by --skip-missing",
        layout=layout or Layout(),
        progress=progress,
    )


def blend(out: str | Path) -> str | None:
    """YAML for the configuration of a run: `data.sets` of what `lumina_to_shards` wrote to `out`; None for one set."""
    weights = json.loads((Path(out) / "weights.json").read_text(encoding="utf-8"))
    if len(weights) == 1:
        return None
    sets = [{"shards": [str(Path(out) / entry["folder"])], "weight": entry["weight"]} for entry in weights]
    text = {"allow_unicode": True, "sort_keys": False, "default_flow_style": None, "width": 2**20}
    return yaml.safe_dump({"data": {"sets": sets}}, **text)


def read_entries(config: Path) -> list[Entry]:
    """The entries of a description; `ValueError` names the one that is wrong."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{config} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is no YAML ({' '.join(str(error).split())})") from error
    metas = content.get("META") if isinstance(content, dict) else None
    if not isinstance(metas, list) or not metas:
        raise ValueError(f"{config} must hold META, a list of entries such as {{path: items.json, root: pictures}}")
    keys = Keys()
    return [
        _entry(meta, f"META entry {i} of {config}", config.parent, keys, len(metas)) for i, meta in enumerate(metas, 1)
    ]


def _entry(meta: object, where: str, base: Path, keys: Keys, count: int) -> Entry:
    if not isinstance(meta, dict):
        raise ValueError(f"{where} must be {{path: …, root: …, ratio: …, type: …}}, not {meta!r}")
    for key in meta:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise ValueError(f"{where} has the unknown key {key!r}" + (f"; did you mean {close[0]}?" if close else ""))
    for key in ("path", "root", "type"):
        if not isinstance(meta.get(key, ""), str) or (key == "path" and not meta.get("path")):
            raise ValueError(f"{where}: {key} must be text, not {meta.get(key)!r}")
    ratio = meta.get("ratio", 1.0)
    if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
        raise ValueError(f"{where}: ratio must be a number above 0, not {ratio!r}")
    items = (base / meta["path"]).resolve()
    root = (base / meta["root"]).resolve() if meta.get("root") else items.parent
    if not items.is_file():
        raise ValueError(f"{where}: path {items} is missing")
    if not root.is_dir():
        raise ValueError(f"{where}: root {root} is no folder")
    stem = re.sub(r"\.jsonl?(\.gz)?$", "", items.name, flags=re.IGNORECASE)
    folder = keys.of(stem) if count > 1 else ""
    return Entry(folder, items, root, float(ratio), meta.get("type", "default"))


def _items(entry: Entry, seed: int, skip_missing: bool, skips: Skips) -> Iterator[Item]:
    for where, row in rows(entry.items):
        if isinstance(row, str):
            skips.add(f"{where} of {entry.items.name}", "wrong item", allowed=skip_missing, detail=row)
        elif entry.ratio >= 1 or _share(row, seed) < entry.ratio:
            item = _item(row, entry.root)
            if isinstance(item, Item):
                yield item
            else:
                skips.add(f"{where} of {entry.items.name}", item[0], allowed=skip_missing, detail=item[1])


def _share(row: Mapping[str, Any], seed: int) -> float:
    """A number in [0, 1) that belongs to an item."""
    content = json.dumps(row, sort_keys=True).encode()
    digest = blake2b(content, digest_size=8, key=str(seed).encode(), person=b"lumina.ratio").digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _item(row: Mapping[str, Any], root: Path) -> Item | tuple[str, str]:
    paths = [name for name in _PATHS if row.get(name) is not None]
    if not paths:
        return "wrong item", f"it has none of {', '.join(_PATHS)}"
    media, found = file_at(row[paths[0]], root)
    if media is None:
        return found
    caption, where = _caption(row)
    if fault := caption_fault(caption) if caption is not None else f"it has no {where}":
        return "no usable caption", fault
    return Item(found, media, caption)


def _caption(row: Mapping[str, Any]) -> tuple[object, str]:
    """(caption, None if there is none; where it was looked for)."""
    if "conversations" not in row:
        return row.get("prompt"), '"prompt" nor "conversations"'
    turns = row["conversations"]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            value = turn.get("value")
            if isinstance(value, str):
                # The tag stands where the picture would be put in, often on a line of its own.
                value = re.sub(r"\s*<image>\s*", " ", value).strip()
            return value, 'text in its turn from "gpt"'
    return None, 'turn from "gpt"'
