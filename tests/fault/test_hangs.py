"""Real runs in which a rank stops: who it was is told, in time, and every process ends."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lumina.config.exits import HANG
from tests.parallel.runs import tiny_config, train_tree
from tests.parallel.workers import free_port, start_ranks

pytestmark = pytest.mark.slow
TIMEOUT = 3.0
FOREVER = 100_000


def faulty(rank: int, tree: dict, fault: str, folder: Path) -> None:
    """Train, with a fault of rank 1, from step 3 on or in every step; stderr goes to a file."""
    os.dup2(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if rank == 1 and fault in ("sleeps", "is slow"):
        from lumina.train.feed import Feed

        read, steps = Feed._read, []

        def sleepy(self, batches):
            steps.append(0)
            if fault == "is slow":
                time.sleep(0.1)
            elif len(steps) == 3:
                time.sleep(600)
            return read(self, batches)

        Feed._read = sleepy
    if rank == 1 and fault == "skips":
        from lumina.parallel.mesh import Mesh

        total = Mesh.sum

        def skipping(self, values):
            return list(map(float, values)) if self.activity.at[0] == 3 else total(self, values)

        Mesh.sum = skipping
    train_tree(rank, tree)


class Run:
    """Ranks that train until they are ended."""

    def __init__(self, world, digits, folder, fault="", **changes):
        folder.mkdir(exist_ok=True)
        self.folder, self.run_dir = folder, folder / "run"
        changes = {"train__steps": FOREVER, "watchdog__timeout": TIMEOUT} | changes
        tree = tiny_config(self.run_dir, digits, **changes)
        self.ranks, self._queue = start_ranks(world, faulty, tree, fault, folder, port=free_port(), timeout=120)

    def wait_for_step(self, step):
        deadline = time.monotonic() + 60
        path = self.run_dir / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < step:
            assert time.monotonic() < deadline
            assert all(rank.is_alive() for rank in self.ranks)
            time.sleep(0.02)

    def end(self, stopped=()):
        """Exit codes; stopped ranks are killed once the others have ended."""
        for number, rank in enumerate(self.ranks):
            if number not in stopped:
                rank.join(60)
        seconds = time.monotonic()
        for number in stopped:
            self.ranks[number].kill()
            self.ranks[number].join()
        return [rank.exitcode for rank in self.ranks], seconds

    @property
    def told(self):
        """What was said of the hang, by whichever rank."""
        said = "".join(path.read_text() for path in sorted(self.folder.glob("stderr_*")))
        return [line for line in said.splitlines() if line.startswith("lumina train: ")]

    @property
    def hang(self):
        (folder,) = (self.run_dir / "hangs").iterdir()
        return folder

    @property
    def report(self):
        return json.loads((self.hang / "report.json").read_text())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(digits, tmp_path, victim):
    run = Run(2, digits, tmp_path)
    run.wait_for_step(3)
    pid = run.ranks[victim].pid
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    codes, ended = run.end(stopped=[victim])
    assert codes[1 - victim] == HANG
    assert ended - stopped < TIMEOUT + 2 + 1.5  # … and up to a second for stacks to be written
    (told,) = run.told
    assert f"rank {victim} (host {os.uname().nodename}, pid {pid}, pipeline stage 0) has not been heard of for" in told
    assert re.search(rf"waiting: rank {1 - victim} in all_\w+ \(called at \S+:\d+ in \w+", told)
    assert str(run.hang) in told
    report = run.report
    assert (report["kind"], report["ranks"], report["answered"]) == ("silent", [victim], [1 - victim])
    assert TIMEOUT < report["heartbeats"][victim]["heard_seconds_ago"] < TIMEOUT + 2
    assert report["heartbeats"][1 - victim]["collective"].startswith("all_")
    assert [path.name for path in run.hang.glob("rank_*")] == [f"rank_{1 - victim:05d}.txt"]
    stacks = (run.hang / f"rank_{1 - victim:05d}.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert "in _train" in stacks


def test_a_stopped_stage_of_a_pipeline(digits, tmp_path):
    """Of four ranks; the others wait for it where they are, in messages and in sums."""
    run = Run(4, digits, tmp_path, parallel__pipeline=2)
    run.wait_for_step(3)
    os.kill(run.ranks[2].pid, signal.SIGSTOP)
    codes, _ = run.end(stopped=[2])
    assert [codes[rank] for rank in (0, 1, 3)] == [HANG] * 3
    (told,) = run.told
    assert f"rank 2 (host {os.uname().nodename}, pid {run.ranks[2].pid}, pipeline stage 1) has not been" in told
    assert (run.report["ranks"], run.report["answered"]) == ([2], [0, 1, 3])
    assert all(run.report["heartbeats"][rank]["waits"] for rank in (0, 1, 3))
    assert [beat["stage"] for beat in run.report["heartbeats"]] == [0, 0, 1, 1]


def test_a_rank_that_sleeps_in_its_data(digits, tmp_path):
    run = Run(2, digits, tmp_path, "sleeps")
    codes, _ = run.end()
    assert codes == [HANG, HANG]
    (told,) = run.told
    assert re.search(r"rank 1 \(.*\) has made no progress for [34]\.\d s; it is at step 3, waiting for data, at", told)
    assert "waiting: rank 0 in all_" in told
    assert (run.report["kind"], run.report["ranks"], run.report["answered"]) == ("stuck", [1], [0, 1])
    assert "sleepy" in (run.hang / "rank_00001.txt").read_text()


def test_a_rank_that_skips_a_collective(digits, tmp_path):
    run = Run(2, digits, tmp_path, "skips")
    codes, _ = run.end()
    assert codes == [HANG, HANG]
    (told,) = run.told
    assert "calls that do not match: rank 0 in all_reduce (called at lumina/parallel/mesh.py:" in told
    # The first sum of a step is that of whether it is refused; DeepSpeed takes the norm next.
    assert re.search(r" in sum[^;]*\) of step 3, the optimizer step; rank 1 in all_\w+ \(.*norm.*\) of step 3", told)
    assert run.report["kind"] == "mismatch"
    calls = [beat["calls"]["world"] for beat in run.report["heartbeats"]]
    assert calls[0] == calls[1] + 1


def test_ranks_that_were_all_held_up_go_on(digits, tmp_path):
    """As by Ctrl-Z and fg: for longer than the timeout nobody ran, and nobody is to blame."""
    run = Run(2, digits, tmp_path)
    run.wait_for_step(3)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(TIMEOUT + 1)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGCONT)
        time.sleep(0.7)  # the first could blame the last by now
    run.wait_for_step(len((run.run_dir / "metrics.jsonl").read_text().splitlines()) + 20)
    time.sleep(1)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert run.end()[0] == [0, 0]
    assert run.told == []


def test_a_slow_rank_is_named_in_the_metrics(digits, tmp_path):
    run = Run(2, digits, tmp_path, "is slow", watchdog__timeout=30.0)
    deadline, named = time.monotonic() + 60, []
    while not named and time.monotonic() < deadline:
        time.sleep(0.5)
        path = run.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        named = [line for line in map(json.loads, lines) if line["slowest_rank"] is not None]
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    codes, _ = run.end()
    assert codes == [0, 0]
    assert {line["slowest_rank"] for line in named} == {1}
    assert named[-1]["slowest_ratio"] > 1.5
    assert run.told == []
    assert not (run.run_dir / "hangs").exists()
