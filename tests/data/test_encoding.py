"""`lumina data encode` and `show` where the data, the folder or the command is not as it should be."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.cli import main
from lumina.config.load import dump_config, validate
from lumina.data.index import Index
from lumina.data.write import write_shards
from tests.data.conftest import png
from tests.parallel.runs import tiny_config

BAD = b"\x89PNG\r\n\x1a\nnothing more"


def pictures(first: int, count: int, bad: int = 0) -> list[dict[str, object]]:
    """`count` samples, of which the first `bad` do not read."""
    return [
        {"__key__": f"p{i:03d}", "png": BAD if i - first < bad else png(8, 8, i), "txt": f"photo {i}"}
        for i in range(first, first + count)
    ]


class Encoding:
    """Runs the command on shards in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.shards = folder, folder / "out", []

    def shard(self, name: str, samples: list[dict[str, object]]) -> None:
        write_shards(self.folder / name, samples, name=name, samples_per_shard=1000)
        self.shards.append(str(self.folder / name))

    def config(self, **changes: object) -> str:
        tree = tiny_config(self.folder / "run", self.folder, data__shards=self.shards, **changes)
        path = self.folder / "run.yaml"
        path.write_text(dump_config(validate(tree, "test")))
        return str(path)

    def __call__(self, *options: str, out: Path | None = None, **changes: object) -> int:
        return main(["data", "encode", self.config(**changes), str(out or self.out), *options])

    def written(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*.tar"))


@pytest.fixture
def encoding(tmp_path: Path) -> Encoding:
    return Encoding(tmp_path)


def test_nothing_that_can_be_read(encoding: Encoding, capsys: pytest.CaptureFixture) -> None:
    """Of all that are encoded at once, and of a shard altogether: the others are written, and again nothing is."""
    encoding.shard("a", pictures(0, 20, bad=16))
    encoding.shard("b", pictures(20, 3, bad=3))
    encoding.shard("c", pictures(23, 5))
    for count in ("9", "0"):
        assert encoding(data__bad_samples=1.0) == 0
        said = capsys.readouterr()
        assert said.out == f"{count} samples encoded into {encoding.out}, 19 left out\n"
        assert "b-000000-000001.tar is not written: no sample of b-000000.tar can be read" in said.err
        assert encoding.written() == ["a-000000-000000.tar", "c-000000-000002.tar"]
    index = Index.open([encoding.out])
    assert [index.key(i) for i in range(9)] == [f"p{i:03d}" for i in (*range(16, 20), *range(23, 28))]


def test_the_budget_holds_from_start_to_start(encoding: Encoding, capsys: pytest.CaptureFixture) -> None:
    encoding.shard("a", pictures(0, 20, bad=4))
    encoding.shard("b", pictures(20, 5))
    for last in ("; the last is sample p003 of a-000000.tar: picture does not decode", "allows\n"):
        assert encoding() == 2
        said = capsys.readouterr().err
        assert "4 of 20 samples cannot be read, more than data.bad_samples=0.01 allows" in said
        assert last in said
        assert encoding.written() == ["a-000000-000000.tar"]
    assert encoding(data__bad_samples=0.5) == 0
    assert capsys.readouterr().out == f"5 samples encoded into {encoding.out}, 4 left out\n"


def test_a_shard_that_is_not_whole_is_written_again(encoding: Encoding, capsys: pytest.CaptureFixture) -> None:
    encoding.shard("a", pictures(0, 4))
    assert encoding() == 0
    target = encoding.out / "a-000000-000000.tar"
    whole = target.read_bytes()
    target.write_bytes(whole[:5000])
    assert encoding() == 0
    assert target.read_bytes() == whole
    assert capsys.readouterr().out.count("4 samples encoded") == 2


def test_where_nothing_is_written(encoding: Encoding, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoding.shard("a", pictures(0, 2))
    (tmp_path / "file").write_text("x")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "encoding.json").write_text("[]")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "encoding.json").write_text("{")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, options, sentence in (
        ("out", ["--crops", "0"], "--crops must be at least 1, not 0"),
        ("a", [], "a is not empty and holds nothing that was encoded (a-000000."),
        ("file", [], "file cannot be written (File exists)"),
        ("file/below", [], "file/below cannot be written (Not a directory)"),
        ("half", [], "encoding.json is damaged (no object); delete its folder, or name another"),
        ("torn", [], "encoding.json is damaged (Expecting"),
    ):
        assert encoding(*options, out=tmp_path / out) == 2, out
        assert sentence in capsys.readouterr().err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path.name != "run.yaml"} == before


def test_views_that_are_drawn_are_of_one_seed(encoding: Encoding, capsys: pytest.CaptureFixture) -> None:
    encoding.shard("a", pictures(0, 2))
    run = {"dir": str(encoding.folder / "run"), "seed": 4}
    assert encoding() == 0
    assert encoding(run=run) == 0, "the middle is cut out whatever the seed"
    for name, drawn in (("crop", {"data__crop": "random"}), ("flip", {"data__flip": True})):
        out = encoding.folder / name
        assert encoding(out=out, **drawn) == 0
        assert encoding(out=out, run=run, **drawn) == 2
        assert "was made with seed=3, not 4; go on with that" in capsys.readouterr().err
        assert json.loads((out / "encoding.json").read_text())["seed"] == 3


def test_where_a_batch_cannot_be_shown(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    encoding.shard("a", pictures(0, 12))
    config = encoding.config()
    for out, sentence in (
        ("batch.xyz", "batch.xyz is no picture; name one that ends in .png, .jpg, .jpeg, .webp"),
        ("none/batch.png", f"there is no folder {tmp_path}/none"),
    ):
        assert main(["data", "show", config, "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr()
        assert (said.out, sentence in said.err) == ("", True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["data", "show", config, "--out", str(tmp_path / "batch.png")]) == 2
    assert "batch.png cannot be written (No space left on device)" in capsys.readouterr().err


def test_what_a_run_would_refuse_is_not_shown(encoding: Encoding, capsys: pytest.CaptureFixture) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((8, 8, 1), np.uint8))
    encoding.shard("a", [{"__key__": f"{i}", "npy": stream.getvalue(), "json": {"label": 1}} for i in range(3)])
    assert main(["data", "show", encoding.config()]) == 2
    assert "sample 0 of a-000000.tar has no caption, on which the model is conditioned" in capsys.readouterr().err
