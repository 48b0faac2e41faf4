"""kill -9, at any moment and in the middle of saves: what was committed loads, and the run goes on as if nothing was.

LUMINA_TEST_KILLS and LUMINA_TEST_SAVE_KILLS ask for more of them than a run of all tests does.
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import checkpoints_of
from lumina.checkpoint.save import Piece, Saver
from lumina.config.load import validate
from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_on, train_tree
from tests.parallel.workers import free_port, start_ranks
from tests.unit.checkpoints import on_ranks, state_of

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("LUMINA_TEST_KILLS", "5"))
SAVE_KILLS = int(os.environ.get("LUMINA_TEST_SAVE_KILLS", "20"))
EVERY = 3


def test_a_run_killed_at_random_moments_equals_the_unbroken_one(digits, tmp_path):
    """Any of two ranks, at any time from its first moment on; every other run saves asynchronously."""
    steps = 12
    changes = {"train__steps": steps, "checkpoint__every": EVERY, "parallel__zero_stage": 1}
    unbroken = tmp_path / "unbroken"
    train_on(2, tiny_config(unbroken, digits, **changes))
    expected, tensors = metrics_of(unbroken), tensors_of(unbroken)
    draw, done, kills = random.Random(7), 0, []
    while done < KILLS:
        run_dir = tmp_path / f"killed{len(kills)}"
        asynchronous = len(kills) % 2 == 1
        tree = tiny_config(run_dir, digits, **changes)
        tree["checkpoint"]["async"] = asynchronous
        kills.append([])
        while done < KILLS and _step_reached(run_dir) < steps:
            done += _train_and_kill(tree, draw, kills[-1], run_dir, 2 * EVERY if asynchronous else EVERY)
        train_on(2, tree)
        assert [line["loss"] for line in metrics_of(run_dir)] == [line["loss"] for line in expected]
        found = tensors_of(run_dir)
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        assert not any(Checkpoint(folder).damage() for folder in checkpoints_of(run_dir))
    print(f"{done} kills in {len(kills)} runs; (rank, steps done, steps kept) of each: {kills}")


def _step_reached(run_dir: Path) -> int:
    """Of the last whole line of metrics."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _train_and_kill(tree, draw, kills, run_dir, most_lost) -> int:
    """Start two ranks, kill one of them; whether one was left to kill."""
    ranks, _ = start_ranks(2, train_tree, tree, port=free_port())
    delay = draw.uniform(0.0, 3.0)
    # Half of the kills wait for the first step, which is later on a busy machine.
    waits, before = draw.random() < 0.5, _step_reached(run_dir)
    while waits and _step_reached(run_dir) == before and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
    time.sleep(delay if not waits else delay / 3)
    victim = draw.randrange(2)
    alive = ranks[victim].is_alive()
    ranks[victim].kill()
    for rank in ranks:
        rank.join(timeout=5)
        rank.kill()  # as a launcher does: one that waits for the other to come to a first meeting would wait long
        rank.join()
    folders = checkpoints_of(run_dir)
    kept = Checkpoint(folders[-1]).manifest.step if folders else 0
    done = _step_reached(run_dir)
    if alive:
        kills.append((victim, done, kept))
    assert done - kept <= most_lost, f"{done - kept} steps are lost"
    assert not folders or Checkpoint(folders[-1]).damage() == ""
    return int(alive)


def test_killed_in_the_middle_of_saves(tmp_path):
    """Saves one after another, by two ranks of one process; what the newest holds is what was saved then."""
    draw, context = random.Random(11), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preload"])
    steps: list[int] = []
    for number in range(SAVE_KILLS):
        run_dir = tmp_path / f"run{number % 4}"
        saving = context.Process(target=_save_on_and_on, args=(run_dir, bool(number % 2)))
        before = steps[-4] if number >= 4 else 0
        saving.start()
        # From its first save on, anywhere in one that follows.
        while _newest_of(run_dir) == before and saving.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.25))
        saving.kill()
        saving.join()
        folders = checkpoints_of(run_dir)
        for folder in folders:
            checkpoint = Checkpoint(folder)
            assert checkpoint.damage() == "", f"kill {number}"
            step = checkpoint.manifest.step
            assert torch.equal(checkpoint.read("master", "w0"), values_of(step))
        assert step > before, "the save before the kill is lost"
        steps.append(step)
    print(f"newest steps after {SAVE_KILLS} kills: {steps}")


def _newest_of(run_dir: Path) -> int:
    """The step of the newest checkpoint by its folder's name, 0 without one."""
    return max((int(folder.name.removeprefix("step_")) for folder in checkpoints_of(run_dir)), default=0)


def values_of(step: int) -> torch.Tensor:
    return torch.arange(40_000.0) + step


def _save_on_and_on(run_dir: Path, asynchronous: bool) -> None:
    tree = tiny_config(run_dir, run_dir)
    tree["checkpoint"] |= {"keep": 3, "async": asynchronous}
    config = validate(tree, "test")
    folders = checkpoints_of(run_dir)
    first = Checkpoint(folders[-1]).manifest.step + 1 if folders else 1

    def work(mesh):
        saver, half = Saver(run_dir, config, mesh), 20_000 * mesh.world.rank
        for step in range(first, first + 10_000):
            values = values_of(step)[half : half + 20_000]
            saver.start(state_of(step), [Piece("master", f"w{i}", (40_000,), half, values) for i in range(8)])

    on_ranks(2, work)
