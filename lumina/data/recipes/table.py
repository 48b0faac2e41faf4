"""A table (CSV, TSV, JSON, JSON lines) that names files and captions → shards."""

import contextlib
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lumina.data.decode.text import label_fault
from lumina.data.recipes.items import Item, Skips, caption_fault, located, media_fault
from lumina.data.recipes.making import Layout, Progress, Summary, make_shards

Row = tuple[str, Mapping[str, Any] | str]
FORMATS = ("csv", "tsv", "json", "jsonl")


def table_to_shards(
    table: str | Path,
    out: str | Path,
    *,
    media: str,
    caption: str | None = None,
    label: str | None = None,
    root: str | Path | None = None,
    skip_missing: bool = False,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the files that a table names into shards, byte for byte, in the order of the table.

    Args:
        table: .csv or .tsv with a header, .json (a list of objects) or .jsonl (an object a line), also with .gz behind;
            UTF-8.
        out: a new or empty folder.
        media: column (or key) of the file's path.
        caption: column of the caption.
        label: column of the class, whole numbers from 0. At least one of caption and label must be given.
        root: folder that the paths are relative to; None for that of the table.
        skip_missing: leave out lines whose file is missing or that are wrong otherwise, instead of refusing.
        layout: how samples become shards.
        progress: see `making.Progress`.

    Raises:
        ValueError: the table cannot be read or lacks a column, lines are wrong, or as `make_shards`.
    """
    if caption is None and label is None:
        raise ValueError("a sample needs a caption or a label; name the column by --caption or --label")
    table = Path(table).resolve()
    base = table.parent if root is None else Path(root).resolve()
    if not base.is_dir():
        raise ValueError(f"--root {root} is no folder")
    columns = {"media": media} | {name: column for name, column in (("caption", caption), ("label", label)) if column}

    def items(skips: Skips) -> Iterator[Item]:
        for where, row in rows(table, list(columns.values())):
            item = row if isinstance(row, str) else _item(row, columns, base)
            if isinstance(item, Item):
                yield item
            elif isinstance(item, str):
                skips.add(where, "wrong line", allowed=skip_missing, detail=item)
            else:
                skips.add(where, item[0], allowed=skip_missing, detail=item[1])

    return make_shards(
        out,
        {"": items},
        arguments={"recipe": "table", "table": str(table), "root": str(base), "skip-missing": skip_missing, **columns},
        mend="mend them, or leave them out by --skip-missing",
        layout=layout or Layout(),
        progress=progress,
    )


def rows(table: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """("line 3" or "item 3", row) for each row, counted from 1 as in an editor; for a bad one a str, what is wrong.

    Args:
        table: as for `table_to_shards`.
        columns: of a .csv or .tsv, those that the header must have.

    Raises:
        ValueError: the file is missing or damaged, is of no such format, or its header lacks a column.
    """
    form = table.name.lower().removesuffix(".gz").rpartition(".")[2]
    if form not in FORMATS:
        raise ValueError(f"{table} is no .{', .'.join(FORMATS)} nor one of these with .gz behind; rename or convert it")
    opened = gzip.open if table.name.lower().endswith(".gz") else open
    try:
        # What is not UTF-8 is found row by row, so that it can be named.
        with (
            opened(table, "rb") as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield from {"json": _json_list, "jsonl": _json_lines}.get(form, _separated)(text, table, columns or [])
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{table} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _separated(text: io.TextIOWrapper, table: Path, columns: list[str]) -> Iterator[Row]:
    tabs = table.name.lower().removesuffix(".gz").endswith(".tsv")
    with _long_fields():
        reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
        header = next(reader, [])
        for column in columns:
            if column not in header:
                close = difflib.get_close_matches(column, header, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{table} has no column {column!r}, but {', '.join(header) or 'no header'}{hint}")
        if twice := [column for column in columns if header.count(column) > 1]:
            raise ValueError(f"{table} has the column {twice[0]!r} twice")
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                # What follows an open quote cannot be told from what it quotes.
                raise ValueError(f"line {line} of {table} cannot be read ({error})") from error
            if row is None:
                return
            if not row:
                continue
            wrong = f"it has {len(row)} fields, the header {len(header)}" if len(row) != len(header) else None
            yield f"line {line}", wrong or dict(zip(header, row, strict=True))


def _json_lines(text: io.TextIOWrapper, table: Path, _: list[str]) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield f"line {number}", _object(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield f"line {number}", f"it does not parse: {error}"


def _json_list(text: io.TextIOWrapper, table: Path, _: list[str]) -> Iterator[Row]:
    try:
        content = json.load(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table} does not parse as JSON ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{table} must hold a list of objects, not {type(content).__name__}; one a line is .jsonl")
    for number, item in enumerate(content, 1):
        yield f"item {number}", _object(item)


def _object(item: object) -> Mapping[str, Any] | str:
    return item if isinstance(item, dict) else f"it is no object but {type(item).__name__}"


def _item(row: Mapping[str, Any], columns: Mapping[str, str], root: Path) -> Item | tuple[str, str]:
    absent = [column for column in columns.values() if row.get(column) is None]
    if absent:
        return "wrong line", f"{absent[0]!r} is missing"
    found = file_at(row[columns["media"]], root)
    if found[0] is None:
        return found[1]
    caption, fields = None, None
    if "caption" in columns:
        caption = row[columns["caption"]]
        if fault := caption_fault(caption):
            return "no usable caption", fault
    if "label" in columns:
        label = row[columns["label"]]
        # Longer ones are too large, and Python refuses to read the very long.
        if isinstance(label, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", label):
            label = int(label)
        if fault := label_fault(label):
            return "no usable label", f"it {fault}"
        fields = json.dumps({"label": label})
    return Item(found[1], found[0], caption, fields)


def file_at(path: object, root: Path) -> tuple[str, str] | tuple[None, tuple[str, str]]:
    """(path of a media file, name for its key), or (None, (reason, detail)) if it cannot be stored."""
    if not isinstance(path, str) or not path.strip():
        return None, ("wrong path", f"{path!r} is no path of a file")
    if "://" in path:
        return None, ("wrong path", f"{path} is an address; download the file and name its path")
    media, name = located(path, root)
    fault = media_fault(media)
    return (media, name) if fault is None else (None, fault)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    # A caption may be longer than the 128 KiB that the module takes for an open quote.
    before = csv.field_size_limit(1 << 26)
    try:
        yield
    finally:
        csv.field_size_limit(before)
