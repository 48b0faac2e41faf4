"""Files of all media side by side, from what people have to what a model is given, by each of the recipes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lumina.data.check import check_shards
from lumina.data.index import Index
from lumina.data.loader import Loader
from lumina.data.recipes.folder import folder_to_shards
from lumina.data.recipes.lumina_json import lumina_to_shards
from lumina.data.recipes.making import Layout, Summary
from lumina.data.recipes.table import table_to_shards
from lumina.data.shard_index import KINDS
from lumina.data.sizing import Sizing, Stage
from tests.data.media import FRAMES, RATE, frames, grey, npy, picture, video, wav
from tests.data.pictures import members

# (kind, height, width, frames, seconds) of each by hand.
EXPECTED = {
    "clip.mp4": ("video", 24, 32, FRAMES, FRAMES / RATE),
    "dot.png": ("image", 4, 4, 1, 0),
    "film.npy": ("video", 12, 16, 7, 0),
    "photo.jpg": ("image", 16, 24, 1, 0),
    "still.npy": ("image", 8, 20, 1, 0),
    "tone.wav": ("audio", 0, 0, 0, 0.25),
}
LEVEL = {"dot.png": 90, "photo.jpg": 100, "still.npy": grey(0)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media") / "src"
    folder.mkdir()
    contents = {
        "clip.mp4": video(frames(FRAMES, 24, 32), g="8", bf="2", crf="4"),
        "dot.png": picture(4, 4, LEVEL["dot.png"], "PNG"),
        "film.npy": npy(frames(7, 12, 16)),
        "photo.jpg": picture(16, 24, LEVEL["photo.jpg"], "JPEG"),
        "still.npy": npy(frames(1, 8, 20)[0]),
        "tone.wav": wav(np.sin(np.arange(2000, dtype=np.float32) / 10) / 2),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}", encoding="utf-8")
    return folder


def by_folder(source: Path, tmp_path: Path, layout: Layout) -> Summary:
    return folder_to_shards(source, tmp_path / "out", layout=layout)


def by_table(source: Path, tmp_path: Path, layout: Layout) -> Summary:
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "text"), *((name, f"caption of {name}") for name in EXPECTED)])
    return table_to_shards(
        tmp_path / "t.csv", tmp_path / "out", media="file", caption="text", root=source, layout=layout
    )


def by_description(source: Path, tmp_path: Path, layout: Layout) -> Summary:
    items = [{"path": name, "prompt": f"caption of {name}"} for name in EXPECTED]
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "d.yaml").write_text(f"META: [{{path: items.json, root: {source}}}]")
    return lumina_to_shards(tmp_path / "d.yaml", tmp_path / "out", layout=layout)


@pytest.mark.parametrize("make", [by_folder, by_table, by_description])
def test_all_media_through_every_room(make: Callable, source: Path, tmp_path: Path, make_plan) -> None:
    summary = make(source, tmp_path, Layout(samples_per_shard=4, workers=1))
    out = tmp_path / "out"
    assert (summary.samples, summary.shards, summary.skipped) == (6, 2, {})
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert [dict(shard).keys() for shard in members(out).values()] == [set(sorted(files)[:8]), set(sorted(files)[8:])]
    assert {name: content for shard in members(out).values() for name, content in shard} == files
    index = Index.open([out], build_missing=False)
    columns = [index.column(name).tolist() for name in ("kind", "height", "width", "frames", "duration")]
    for kind, *numbers, expected in zip(*columns, EXPECTED.values(), strict=True):
        assert (KINDS[kind], *numbers) == pytest.approx(expected, abs=1e-6)
    report = check_shards([out], decode=True, workers=1)
    assert (report.problems, report.samples) == ((), 6)

    sizing = Sizing(4, (Stage(0, None),), frames=4, frame_step=2)
    plan = make_plan(index, sizing=sizing, tokens_per_pack=256, packs=3, lanes=1)
    ledger = tmp_path / "ledger.jsonl"
    loader = Loader(index, plan, sizing, rank=0, world=1, channels=1, bad_samples=1.0, ledger_path=ledger)
    stream, seen = iter(loader), {}
    while len(seen) < 6:
        for sample in (sample for pack in next(stream).packs for sample in pack):
            seen["stand-in" if sample.occurrence else sample.caption.removeprefix("caption of ")] = sample
    stream.close()
    # Sound has its place in shards and is no pixels: a sample no longer than it stands in.
    assert set(seen) == {*EXPECTED, "stand-in"} - {"tone.wav"}
    (bad,) = map(json.loads, ledger.read_text().splitlines())
    assert (bad["key"], bad["reason"]) == ("tone", "sound is not trained on")
    for name, level in LEVEL.items():
        _, height, width, *_ = EXPECTED[name]
        assert seen[name].pixels.shape == (1, 1, height, width)
        assert float(seen[name].pixels.max() + 1) * 127.5 == pytest.approx(level, abs=1)
    # Every second frame, the clip lying in the middle: 20 frames leave 13 to begin with, 7 leave one.
    for name, first in (("clip.mp4", 6), ("film.npy", 0)):
        _, height, width, *_ = EXPECTED[name]
        assert seen[name].pixels.shape == (4, 1, height, width)
        found = (seen[name].pixels.mean((1, 2, 3)).numpy() + 1) * 127.5
        np.testing.assert_allclose(found, [grey(first + 2 * place) for place in range(4)], atol=2)
