"""A folder of pictures, videos and audio with captions beside them → shards."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lumina.data.decode.text import label_fault
from lumina.data.recipes.items import MEDIA_EXTENSIONS, Item, Skips, caption_fault, extension_of, media_fault, walk
from lumina.data.recipes.making import Layout, Progress, Summary, make_shards

CAPTIONS_FROM = ("file", "name", "folder", "none")


def folder_to_shards(
    source: str | Path,
    out: str | Path,
    *,
    caption_from: str = "file",
    label_from: str | None = None,
    skip_uncaptioned: bool = False,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write every picture, video and audio file below `source` into shards, byte for byte, in sorted order.

    Files of other kinds, files whose name begins with a dot, and captions without a file are left out and counted;
    folders whose name begins with a dot are not entered.

    Args:
        source: a folder.
        out: a new or empty folder.
        caption_from: "file": the .txt of the same name, else "caption" in the .json of the same name, which is stored
            as well; "name": the file's own name without extension; "folder": the name of the folder it lies in;
            "none". Underscores of names become spaces.
        label_from: "folder": the label is the number of the folder a file lies in, by the sorted names of all folders
            that hold files; OUT/classes.json lists them. It takes the place of a "label" in a .json.
        skip_uncaptioned: leave out files without a usable caption, instead of refusing.
        layout: how samples become shards.
        progress: see `making.Progress`.

    Raises:
        ValueError: a file has no usable caption or cannot be read, or as `make_shards`.
    """
    if caption_from not in CAPTIONS_FROM:
        raise ValueError(f"captions come from one of {', '.join(CAPTIONS_FROM)}, not from {caption_from!r}")
    if label_from not in (None, "folder"):
        raise ValueError(f"labels come from the folder or not at all, not from {label_from!r}")
    if caption_from == "none" and label_from is None:
        raise ValueError("a sample needs a caption or a label; without captions, give labels by --label-from folder")
    root = Path(source).resolve()
    if not root.is_dir():
        raise ValueError(f"{source} is no folder; give the folder that holds the files")
    classes = _classes(root) if label_from else {}
    arguments = {
        "recipe": "folder",
        "source": str(root),
        "caption-from": caption_from,
        "label-from": label_from,
        "skip-uncaptioned": skip_uncaptioned,
    }

    def items(skips: Skips) -> Iterator[Item]:
        return _items(root, caption_from, classes if label_from else None, skip_uncaptioned, skips)

    return make_shards(
        out,
        {"": items},
        arguments=arguments,
        documents=(lambda _: {"classes.json": list(classes)}) if label_from else None,
        mend="mend or remove them"
        + ("" if skip_uncaptioned else ", or leave out those without a caption by --skip-uncaptioned"),
        layout=layout or Layout(),
        progress=progress,
    )


def _classes(root: Path) -> dict[str, int]:
    names = set()
    for folder, files in walk(str(root)):
        if any(extension_of(name) in MEDIA_EXTENSIONS and not name.startswith(".") for name in files):
            if folder == str(root):
                raise ValueError(f"files lie in {root} itself; with --label-from folder each lies in that of its class")
            names.add(os.path.basename(folder))
    if unreadable := [name for name in names if not name.isprintable()]:
        raise ValueError(f"the folder name {unreadable[0]!r} is not readable as the name of a class")
    return {name: number for number, name in enumerate(sorted(names))}


def _items(
    root: Path, caption_from: str, classes: Mapping[str, int] | None, skip_uncaptioned: bool, skips: Skips
) -> Iterator[Item]:
    for folder, files in walk(str(root)):
        used: set[str] = set()
        beside = {(os.path.splitext(name)[0], extension_of(name)): name for name in reversed(files)}
        below = os.path.relpath(folder, root)
        for name in files:
            relative = os.path.normpath(os.path.join(below, name))
            stem, extension = os.path.splitext(name)[0], extension_of(name)
            if extension in ("txt", "json") and caption_from == "file" and not name.startswith("."):
                continue  # met with its file, or below
            if name.startswith("."):
                skips.add(relative, "hidden file", allowed=True)
                continue
            if extension not in MEDIA_EXTENSIONS:
                skips.add(relative, f"file of another kind (.{extension})", allowed=True)
                continue
            if fault := media_fault(os.path.join(folder, name)):
                skips.add(relative, fault[0], allowed=False, detail=fault[1])
                continue
            found = {kind: beside[stem, kind] for kind in ("txt", "json") if (stem, kind) in beside}
            used.update(found.values())
            try:
                caption, fields = _texts(Path(folder), name, caption_from, found)
                fields = _labelled(fields, classes, os.path.basename(folder))
            except _NoCaption as error:
                skips.add(relative, error.reason, allowed=skip_uncaptioned, detail=str(error))
                continue
            yield Item(os.path.splitext(relative)[0].replace(os.sep, "/"), os.path.join(folder, name), caption, fields)
        if caption_from == "file":
            for name in files:
                if extension_of(name) in ("txt", "json") and name not in used and not name.startswith("."):
                    skips.add(os.path.normpath(os.path.join(below, name)), "caption without a file", allowed=True)


class _NoCaption(ValueError):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def _texts(folder: Path, name: str, caption_from: str, beside: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(text of .txt, text of .json) of one file."""
    if caption_from == "none":
        return None, None
    if caption_from != "file":
        words = os.path.splitext(name)[0] if caption_from == "name" else folder.name
        caption = " ".join(words.replace("_", " ").split())
        if fault := caption_fault(caption):
            raise _NoCaption("no usable caption", fault)
        return caption, None
    if not beside:
        raise _NoCaption("no caption")
    text = _read(folder / beside["txt"]) if "txt" in beside else None
    fields = _read(folder / beside["json"]) if "json" in beside else None
    caption: object = text
    if fields is not None:
        try:
            parsed = json.loads(fields)
        except ValueError as error:
            raise _NoCaption("no usable caption", f"{beside['json']} does not parse: {error}") from error
        if not isinstance(parsed, dict):
            raise _NoCaption("no usable caption", f"{beside['json']} must hold an object with a caption")
        label = parsed.get("label")
        if label is not None and (fault := label_fault(label)):
            raise _NoCaption("no usable label", f'"label" in {beside["json"]} {fault}')
        if text is None:
            if parsed.get("caption") is None:
                raise _NoCaption("no caption", f'{beside["json"]} has no "caption"')
            caption = parsed["caption"]
    if fault := caption_fault(caption):
        raise _NoCaption("no usable caption", fault)
    return text, fields


def _labelled(fields: str | None, classes: Mapping[str, int] | None, folder: str) -> str | None:
    if classes is None:
        return fields
    content = json.loads(fields) if fields else {}
    return json.dumps(content | {"label": classes[folder]}, sort_keys=True, ensure_ascii=False)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _NoCaption("no usable caption", f"{path.name} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise _NoCaption("no usable caption", f"{path.name} cannot be read: {error.strerror}") from error
