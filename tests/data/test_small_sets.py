"""The commands that make small sets: what they print, what they make, and what they say about bad input."""

import shutil
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.data.index import Index


@pytest.mark.parametrize(
    ("verb", "options", "shape", "what"),
    [
        ("moving-digits", ["--frames", "6", "--size", "20"], (6, 20, 20), "videos"),
        ("turntable", ["--size", "24"], (12, 24, 24), "objects"),
        ("speech", ["--width", "56", "--held"], (1, 80, 56), "words"),
    ],
)
def test_one_command_each(tmp_path: Path, capsys, verb: str, options: list[str], shape: tuple, what: str) -> None:
    if verb == "speech" and shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    out = tmp_path / "new" / verb
    assert main(["data", verb, str(out), "--count", "4", "--seed", "1", *options]) == 0
    assert capsys.readouterr().out == f"4 {what} in 1 shard under {out}\n"
    index = Index.open([out])
    assert len(index) == 4
    columns = ("frames", "height", "width")
    assert {tuple(int(index.column(name)[n]) for name in columns) for n in range(4)} == {shape}
    assert main(["data", verb, str(out), "--count", "4"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    for arguments, words in (
        (["moving-digits", out, "--count", "0"], "at least 1, not 0"),
        (["moving-digits", out, "--frames", "12"], "at least 19 pixels, not 16"),
        (["turntable", out, "--size", "2"], "at least 8 × 8 pixels"),
        (["turntable", out, "--seed", "-4"], "seed must be at least 0, not -4"),
        (["speech", out, "--width", "0"], "width must be at least 1, not 0"),
    ):
        assert main(["data", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
