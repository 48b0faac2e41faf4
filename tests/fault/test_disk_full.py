"""A full disk: training goes on, what was saved stays, it is said, and three failures in a row end the run."""

import os
import subprocess
from pathlib import Path

import pytest

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import checkpoints_of
from lumina.config.load import validate
from lumina.train.loop import train
from tests.parallel.runs import metrics_of, tiny_config

SAVE = 340_000  # bytes of a checkpoint of the tiny model, and a little


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs takes root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all but `leave` bytes."""
    filler = folder / "filler"
    disk = os.statvfs(folder)
    with filler.open("wb") as file:
        file.write(bytes(disk.f_bavail * disk.f_frsize - leave))
    return filler


def config_of(run_dir, digits, steps, every, **changes):
    tree = tiny_config(run_dir, digits, train__steps=steps, checkpoint__every=every, checkpoint__keep=100, **changes)
    return validate(tree, "test")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_three_in_a_row_end_the_run(small_disk, digits, capsys, asynchronous):
    fill(small_disk, 2 * SAVE + SAVE // 2)  # room for two checkpoints
    run_dir = small_disk / "run"
    config = config_of(run_dir, digits, 50, 1, checkpoint__async=asynchronous)
    with pytest.raises(OSError, match=r"3 saves in a row failed: .*step 5 .*No space left on device.* is as it was"):
        train(config)
    told = capsys.readouterr().err
    for step in (3, 4):
        assert f"the checkpoint of step {step} could not be saved" in told
    folders = checkpoints_of(run_dir)
    assert [folder.name for folder in folders] == ["step_00000001", "step_00000002"]
    assert not any(Checkpoint(folder).damage() for folder in folders)
    assert [line["step"] for line in metrics_of(run_dir)][:5] == [1, 2, 3, 4, 5]


def test_a_disk_that_fills_and_empties_costs_two_saves_and_no_line(small_disk, digits, monkeypatch, capsys):
    """Not a byte is left from the third step to the fifteenth; TensorBoard is on."""
    from lumina.train import loop

    run_dir, step = small_disk / "run", loop.train_step

    def disturbed(*arguments, **rest):
        if rest["step"] == 3:
            fill(small_disk, 0)
        if rest["step"] == 16:
            (small_disk / "filler").unlink()
        return step(*arguments, **rest)

    monkeypatch.setattr(loop, "train_step", disturbed)
    train(config_of(run_dir, digits, 18, 6, log__tensorboard=True))
    told = capsys.readouterr().err
    assert "metrics.jsonl cannot be written (No space left on device): its lines wait until it can" in told
    assert all(f"the checkpoint of step {step} could not be saved" in told for step in (6, 12))
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, 19))
    assert [int(folder.name[5:]) for folder in checkpoints_of(run_dir)] == [18]
