"""A folder becomes shards that hold its files byte for byte, and nothing is left out in silence."""

import json
import os
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from lumina.data.index import Index
from lumina.data.recipes.folder import folder_to_shards
from lumina.data.recipes.making import Layout
from tests.data.pictures import captioned, digit_png, files, members

ONE = Layout(workers=1)


def test_files_byte_for_byte_in_sorted_order(tmp_path: Path) -> None:
    source = captioned(tmp_path / "src", 10)
    summary = folder_to_shards(source, tmp_path / "out", layout=Layout(samples_per_shard=4, workers=1))
    assert (summary.samples, summary.shards, summary.skipped, summary.report) == (10, 3, {}, None)
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    expected = []
    for path in sorted(source.rglob("*.png")):
        key = f"{path.parent.name.replace(' ', '_')}/{path.stem.replace('.', '_')}"
        expected += [(f"{key}.png", path.read_bytes()), (f"{key}.txt", path.with_suffix(".txt").read_bytes())]
    found = members(tmp_path / "out")
    assert [len(content) for content in found.values()] == [8, 8, 4]
    assert [member for shard in found.values() for member in shard] == expected
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert read[0]["__key__"] == "c_0/d000_v2"
    assert read[0]["txt"] == b"caption of 0\n"
    assert len(Index.open([tmp_path / "out"], build_missing=False)) == 10


def test_captions_of_json_and_everything_that_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in ("a.png", "b.PNG", "c.jpg", "deep/er/d.png"):
        digit_png(len(name), source / name)
    (source / "a.json").write_text('{"caption":  "of a", "label": 3, "url": "x"}')
    (source / "b.txt").write_bytes("\ufeffof b".encode())
    (source / "b.json").write_text('{"width": 8}')
    (source / "c.txt").write_text("of c")
    (source / "deep/er/d.txt").write_text("of d", encoding="utf-8")
    for name in (".DS_Store", ".e.png", "notes.md", "old.bmp", "orphan.txt", "deep/list.json"):
        (source / name).write_text("x")
    (source / ".git").mkdir()
    (source / ".git" / "f.png").write_text("x")
    (source / "loop").symlink_to(source)
    summary = folder_to_shards(source, tmp_path / "out", layout=ONE)
    assert summary.skipped == {
        "hidden file": 2,
        "file of another kind (.md)": 1,
        "file of another kind (.bmp)": 1,
        "caption without a file": 2,
    }
    listed = [json.loads(line) for line in summary.report.read_text().splitlines()]
    assert sorted(entry["item"] for entry in listed) == sorted(
        [".DS_Store", ".e.png", "notes.md", "old.bmp", "orphan.txt", "deep/list.json"]
    )
    assert summary.report == tmp_path / "out" / "skipped.jsonl"
    (content,) = members(tmp_path / "out").values()
    assert {name: text for name, text in content if not name.endswith(("png", "jpg"))} == {
        "a.json": b'{"caption":  "of a", "label": 3, "url": "x"}',
        "b.json": b'{"width": 8}',
        "b.txt": b"of b",
        "c.txt": b"of c",
        "deep/er/d.txt": b"of d",
    }
    index = Index.open([tmp_path / "out"])
    assert index.column("label").tolist() == [3, -1, -1, -1]
    assert index.column("caption_length").tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("name", "content", "reason", "detail"),
    [
        (None, b"", "no caption", ""),
        ("txt", b" \n", "no usable caption", "empty"),
        ("txt", b"\xff\xfe", "no usable caption", "bad.txt is not UTF-8 (byte 0)"),
        ("txt", b"a\0b", "no usable caption", "zero bytes"),
        ("json", b"{", "no usable caption", "bad.json does not parse"),
        ("json", b"[1]", "no usable caption", "must hold an object"),
        ("json", b'{"text": "a"}', "no caption", 'has no "caption"'),
        ("json", b'{"caption": 3}', "no usable caption", "not int"),
        ("json", b'{"caption": "a", "label": -1}', "no usable label", "from 0 to 2⁶³ - 1, not -1"),
        ("json", b'{"caption": "a", "label": 9223372036854775808}', "no usable label", "not 9223372036854775808"),
        ("json", b'{"caption": "a\\ud800"}', "no usable caption", "not UTF-8"),
    ],
)
def test_without_a_caption_refused_or_skipped(
    tmp_path: Path, name: str | None, content: bytes, reason: str, detail: str
) -> None:
    source = captioned(tmp_path / "src", 2, classes=1)
    digit_png(5, source / "bad.png")
    if name:
        (source / f"bad.{name}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^1 × {reason}: bad\.png.* listed in .*--skip-uncaptioned$"):
        folder_to_shards(source, tmp_path / "out", layout=ONE)
    report = tmp_path / "out.problems.jsonl"
    (record,) = map(json.loads, report.read_text().splitlines())
    assert (record["item"], record["reason"]) == ("bad.png", reason)
    assert detail in record.get("detail", "")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "out.problems.jsonl"}
    summary = folder_to_shards(source, tmp_path / "out", skip_uncaptioned=True, layout=ONE)
    assert (summary.samples, dict(summary.skipped)) == (2, {reason: 1})
    assert not report.exists()


def test_files_that_cannot_be_stored_are_refused_even_so(tmp_path: Path) -> None:
    source = captioned(tmp_path / "src", 2, classes=1)
    (source / "empty.png").touch()
    (source / "dangling.jpg").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"1 × missing file, 1 × empty file: .*; mend or remove them$"):
        folder_to_shards(source, tmp_path / "out", skip_uncaptioned=True, layout=ONE)


def test_captions_from_names_and_labels_from_folders(tmp_path: Path) -> None:
    for path in ("b_cat/x/one_red.png", "b_cat/two.png", "a dog/three.png"):
        digit_png(len(path), tmp_path / "src" / path)
    (tmp_path / "src/b_cat/two.txt").write_text("unused")
    options = {"label_from": "folder", "layout": ONE}
    expected = {
        "name": {"a_dog/three.txt": b"three", "b_cat/two.txt": b"two", "b_cat/x/one_red.txt": b"one red"},
        "folder": {"a_dog/three.txt": b"a dog", "b_cat/two.txt": b"b cat", "b_cat/x/one_red.txt": b"x"},
        "none": {},
    }
    for caption_from, texts in expected.items():
        out = tmp_path / caption_from
        folder_to_shards(tmp_path / "src", out, caption_from=caption_from, **options)
        (content,) = members(out).values()
        assert {name: text for name, text in content if name.endswith("txt")} == texts
        labels = {name: json.loads(text)["label"] for name, text in content if name.endswith("json")}
        assert labels == {"a_dog/three.json": 0, "b_cat/two.json": 1, "b_cat/x/one_red.json": 2}
        assert json.loads((out / "classes.json").read_text()) == ["a dog", "b_cat", "x"]
        assert Index.open([out]).column("label").tolist() == [0, 1, 2]
    digit_png(1, tmp_path / "src" / "loose.png")
    with pytest.raises(ValueError, match=r"files lie in .*src itself"):
        folder_to_shards(tmp_path / "src", tmp_path / "new", caption_from="none", **options)


def test_a_label_from_the_folder_joins_the_json(tmp_path: Path) -> None:
    digit_png(1, tmp_path / "src/a/x.png")
    (tmp_path / "src/a/x.json").write_text('{"caption": "é", "label": 7, "url": "u"}', encoding="utf-8")
    folder_to_shards(tmp_path / "src", tmp_path / "out", label_from="folder", layout=ONE)
    (content,) = members(tmp_path / "out").values()
    assert json.loads(dict(content)["a/x.json"]) == {"caption": "é", "label": 0, "url": "u"}


def test_keys_are_unique_and_fit_a_tar(tmp_path: Path) -> None:
    source = tmp_path / "src"
    long = "ä" * 100
    names = ["x.png", "x.jpg", "x-2.png", "x y.png", "x_y.png", "x.y.png", f"{long}1.png", f"{long}2.png", "新.png"]
    for name in names:
        digit_png(len(name), source / name)
    digit_png(3, source / os.fsdecode(b"raw\xff.png"))
    folder_to_shards(source, tmp_path / "out", caption_from="folder", layout=ONE)
    index = Index.open([tmp_path / "out"])
    keys = [index.key(number) for number in range(len(index))]
    assert len(set(keys)) == len(names) + 1
    assert {"x", "x-2", "x-3", "x_y", "x_y-2", "x_y-3", "新", "raw_"} < set(keys)
    assert all(len(f"{key}.jpeg".encode()) <= 100 and "." not in key for key in keys)
    assert {tuple(sorted(Image.open(source / name).size)) for name in names} == {
        tuple(sorted(size))
        for size in zip(index.column("width").tolist(), index.column("height").tolist(), strict=True)
    }


def test_other_refusals(tmp_path: Path) -> None:
    source = captioned(tmp_path / "src", 1)
    cases = [
        ({"source": tmp_path / "none"}, "is no folder"),
        ({"caption_from": "none"}, "--label-from folder"),
        ({"caption_from": "exif"}, "captions come from one of file, name, folder, none"),
        ({"label_from": "name"}, "labels come from the folder"),
        ({"layout": Layout(shard_size=10239)}, "at least 10240 bytes"),
        ({"layout": Layout(samples_per_shard=0)}, "samples_per_shard must be at least 1"),
        ({"layout": Layout(workers=0)}, "workers must be at least 1"),
        ({"layout": Layout(shuffle=-1)}, "--shuffle must be at least 0"),
        ({"out": source}, "is not empty"),
    ]
    before = files(tmp_path)
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            folder_to_shards(**({"source": source, "out": tmp_path / "out"} | options))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="there are no samples to write"):
        folder_to_shards(tmp_path / "hollow", tmp_path / "out")
    assert files(tmp_path) == before
