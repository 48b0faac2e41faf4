"""Tables of every format give the same shards, and each wrong line is named as an editor numbers it."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from lumina.data.index import Index
from lumina.data.recipes.making import Layout
from lumina.data.recipes.table import table_to_shards
from tests.data.pictures import digit_png, files, members

CAPTIONS = ['a "quoted", red one', "two\nlines", "três ✓", "x" * 200_000]
COLUMNS = {"media": "file", "caption": "text", "label": "class"}


def rows(folder: Path) -> list[dict[str, object]]:
    for number in range(4):
        digit_png(number, folder / "sub" / f"{number}.png")
    return [{"class": 3 - n, "file": f"sub/{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]


def write(path: Path, content: list[dict[str, object]]) -> Path:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if ".json" in path.name:
            whole = json.dumps(content) if ".jsonl" not in path.name else "\n\n".join(map(json.dumps, content))
            stream.write(whole)
        else:
            writer = csv.DictWriter(stream, list(content[0]), delimiter="\t" if ".tsv" in path.name else ",")
            writer.writeheader()
            writer.writerows(content)
    return path


def make(table: Path, out: Path, **options):
    return table_to_shards(table, out, **(COLUMNS | {"layout": Layout(workers=1)} | options))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.json", "t.jsonl", "t.CSV.gz", "t.jsonl.gz"])
def test_every_format(tmp_path: Path, name: str) -> None:
    table = write(tmp_path / name, rows(tmp_path))
    make(table, tmp_path / "out")
    (content,) = members(tmp_path / "out").values()
    assert dict(content) == {
        f"sub/{number}.{extension}": data
        for number, text in enumerate(CAPTIONS)
        for extension, data in (
            ("json", json.dumps({"label": 3 - number}).encode()),
            ("png", (tmp_path / "sub" / f"{number}.png").read_bytes()),
            ("txt", text.encode()),
        )
    }
    assert Index.open([tmp_path / "out"]).column("label").tolist() == [3, 2, 1, 0]


def test_root_absolute_paths_and_one_file_with_two_captions(tmp_path: Path) -> None:
    content = rows(tmp_path / "root")
    content[1]["file"] = str(tmp_path / "root" / "sub" / "1.png")
    content[2]["file"] = "sub/../sub/./0.png"
    content[3]["file"] = str(digit_png(9, tmp_path / "else" / "where" / "a.png"))
    make(write(tmp_path / "t.csv", content), tmp_path / "out", root=tmp_path / "root")
    index = Index.open([tmp_path / "out"])
    assert [index.key(i) for i in range(4)] == ["sub/0", "sub/1", "sub/0-2", "where/a"]
    assert index.read(2)["png"] == index.read(0)["png"]


def test_captions_alone_or_labels_alone(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", rows(tmp_path))
    make(table, tmp_path / "captions", label=None)
    assert set(Index.open([tmp_path / "captions"]).column("label").tolist()) == {-1}
    make(table, tmp_path / "labels", caption=None)
    assert set(Index.open([tmp_path / "labels"]).column("caption_length").tolist()) == {-1}
    with pytest.raises(ValueError, match="a caption or a label; name the column by --caption or --label"):
        make(table, tmp_path / "neither", caption=None, label=None)


BAD_LINES = b"""class,file,text
0,sub/0.png,good
1,sub/1.png,"two
lines"
0,sub/none.png,missing

0,sub/0.png
x,sub/0.png,class is a word
0,sub/0.png,\xff
0,sub/0.txt,format
0,http://host/0.png,address
0,sub/0.png,
0,,no path
0,sub,a folder
1.5,sub/0.png,fraction
"""
BAD = {
    "line 5": ("missing file", "No such file"),
    "line 7": ("wrong line", "it has 2 fields, the header 3"),
    "line 8": ("no usable label", "from 0 to 2⁶³ - 1, not 'x'"),
    "line 9": ("no usable caption", "not UTF-8"),
    "line 10": ("format not read", ".txt is none of"),
    "line 11": ("wrong path", "download"),
    "line 12": ("no usable caption", "empty"),
    "line 13": ("wrong path", "is no path"),
    "line 14": ("format not read", ". is none of"),
    "line 15": ("no usable label", "'1.5'"),
}


def test_wrong_lines_are_named_by_number(tmp_path: Path) -> None:
    rows(tmp_path)
    (tmp_path / "t.csv").write_bytes(BAD_LINES)
    with pytest.raises(ValueError, match=r"2 × no usable label, .*: line 5 \(.*line 15 .*--skip-missing$"):
        make(tmp_path / "t.csv", tmp_path / "out")
    for report in (tmp_path / "out.problems.jsonl", tmp_path / "out" / "skipped.jsonl"):
        if report.parent.name == "out":
            summary = make(tmp_path / "t.csv", tmp_path / "out", skip_missing=True)
            assert (summary.samples, sum(summary.skipped.values())) == (2, 10)
        found = {record["item"]: record for record in map(json.loads, report.read_text().splitlines())}
        assert {item: record["reason"] for item, record in found.items()} == {
            i: reason for i, (reason, _) in BAD.items()
        }
        assert all(detail in found[item]["detail"] for item, (_, detail) in BAD.items())


def test_wrong_json_lines(tmp_path: Path) -> None:
    good = rows(tmp_path)[0]
    lines = [json.dumps(good), "", "{", "[1]", json.dumps(good | {"file": 3}), json.dumps({"file": "sub/0.png"})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    summary = make(tmp_path / "t.jsonl", tmp_path / "out", skip_missing=True)
    found = [json.loads(line) for line in summary.report.read_text().splitlines()]
    assert [(record["item"], record["reason"]) for record in found] == [
        ("line 3", "wrong line"),
        ("line 4", "wrong line"),
        ("line 5", "wrong path"),
        ("line 6", "wrong line"),
    ]
    assert "'text' is missing" in found[3]["detail"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"class,file,txt\n", r"t.csv has no column 'text', but class, file, txt; did you mean txt\?"),
        ("t.csv", b"", "no column 'file', but no header"),
        ("t.csv", b"class,file,text,text\n", "has the column 'text' twice"),
        ("t.csv", b'class,file,text\n0,sub/0.png,"open\n0,sub/1.png,b\n', "line 2 of .*t.csv cannot be read"),
        ("t.json", b"{}", "must hold a list of objects, not dict"),
        ("t.json", b"[", "does not parse as JSON"),
        ("t.xlsx", b"", "t.xlsx is no .csv, .tsv, .json, .jsonl nor one of these with .gz"),
        ("t.csv.gz", b"no gzip", "t.csv.gz cannot be read"),
        ("t.csv.gz", gzip.compress(b"class,file,text\n" * 9, mtime=0)[:-9], "t.csv.gz cannot be read"),
        ("t.csv", b"class,file,text\n", "there are no samples to write"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / name, tmp_path / "out")
    assert files(tmp_path) == before


def test_a_missing_table_and_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv cannot be read \(No such file"):
        make(tmp_path / "none.csv", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--root .* is no folder"):
        make(write(tmp_path / "t.csv", rows(tmp_path)), tmp_path / "out", root=tmp_path / "none")
