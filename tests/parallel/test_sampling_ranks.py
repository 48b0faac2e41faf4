"""`lumina sample` on several ranks: the files of one process, and all or nothing."""

import contextlib
import io
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.parallel.workers import PATIENCE, free_port, run_ranks
from tests.unit.test_pipeline import TINY, write_folder

PROMPTS = ["a two", "a six", "a very long handwritten three"]
COMMAND = ["--count", "3", "--height", "4", "--width", "6", "--steps", "2", "--seed", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "model", replace(TINY, frames=True))


def sample(rank, folder, out, options, broken=None, breaks=None):
    """(exit code, standard output, standard error) of the command; on rank `broken`, writing pictures raises."""
    from lumina.cli import main
    from lumina.inference import media

    if rank == broken:

        def fail(*_):
            raise breaks

        media.SAVE["png"] = fail
    said, complained = io.StringIO(), io.StringIO()
    words = ["sample", str(folder), "--prompt", *PROMPTS, "--out", str(out), *COMMAND, *options]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = main(words)
    return code, said.getvalue(), complained.getvalue()


def sample_late(rank, folder, out, options):
    time.sleep(2 * rank)
    return sample(rank, folder, out, options)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("options", [["--batch-size", "2"], ["--batch-size", "2", "--frames", "3", "--format", "mp4"]])
def test_the_files_are_those_of_one_process(folder, tmp_path, options):
    run_ranks(1, sample, folder, tmp_path / "one", options)
    results = run_ranks(2, sample_late, folder, tmp_path / "two", options)
    assert [code or 0 for code, *_ in results] == [0, 0]
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) == 9 + 2
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len({one[name] for name in one if name[0] == "0"}) == 9
    # One of them says it, once.
    assert [said.count("9 samples in") for _, said, _ in results] == [1, 0]
    assert [complained for *_, complained in results] == ["", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_both_ranks_draw(folder, tmp_path):
    """And unless told otherwise batches are so small that all have some."""
    results = run_ranks(2, counted, folder, tmp_path / "out")
    assert results == [5, 4]
    records = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert records[0]["settings"]["batch_size"] == 5


def counted(rank, folder, out):
    from lumina.inference import media

    written, save = [], media.SAVE["png"]
    media.SAVE["png"] = lambda frames, path: written.append(path) or save(frames, path)
    assert sample(rank, folder, out, [])[0] == 0
    return len(written)


def test_more_ranks_than_batches(folder, tmp_path):
    results = run_ranks(3, sample, folder, tmp_path / "out", ["--batch-size", "5"])
    assert [code for code, *_ in results] == [0, 0, 0]
    assert len(contents(tmp_path / "out")) == 9 + 2


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("breaks", "code", "words"),
    [
        (OSError(28, "No space left on device"), 1, "could not be written to {out}: No space left on device"),
        (ValueError("the brush is broken"), 2, "the brush is broken"),
    ],
)
def test_a_failing_rank_fails_all_with_one_sentence(folder, tmp_path, broken, breaks, code, words):
    out = tmp_path / "out"
    results = run_ranks(2, sample, folder, out, ["--batch-size", "1"], broken, breaks)
    assert [result[0] for result in results] == [code, code]
    assert [said for _, said, _ in results] == ["", ""]
    sentences = [complained for *_, complained in results]
    assert sentences[1 - broken] == ""
    assert words.format(out=out) in sentences[broken]
    assert sentences[broken].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_all_refuse_one_says(folder, tmp_path):
    results = run_ranks(2, sample, folder, tmp_path / "out", ["--solver", "eule"])
    assert [code for code, *_ in results] == [2, 2]
    sentences = [complained for *_, complained in results if complained]
    assert len(sentences) == 1
    assert "eule" in sentences[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_under_torchrun(folder, tmp_path):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "lumina",
    ]
    words = ["sample", str(folder), "--prompt", *PROMPTS, "--out", str(tmp_path / "out"), *COMMAND]
    done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("9 samples in") == 1
    assert len(contents(tmp_path / "out")) == 9 + 2
