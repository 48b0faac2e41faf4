"""Real runs in which a rank stops: who it was is told, in time, and every process ends."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lumina.config.exits import HANG
from lumina.parallel import watchdog
from tests.parallel.runs import tiny_config, train_tree
from tests.parallel.workers import PATIENCE, free_port, start_ranks

pytestmark = pytest.mark.slow
TIMEOUT = 5.0
FOREVER = 100_000


def faulty(rank: int, tree: dict, fault: str, folder: Path) -> None:
    """Train, with a fault of rank 1, from step 3 on or in every step; stderr goes to a file."""
    os.dup2(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    judge_from_the_fault_on(rank, folder)
    if fault in ("sleeps", "skips") or int(os.environ["WORLD_SIZE"]) > 2:
        # Where another rank has time to speak and others to answer, that must be enough on a busy machine.
        watchdog._DEPUTY_SECONDS, watchdog._ANSWER_SECONDS, watchdog._LAST_SECONDS = 600.0, 6.0, 120.0
    if rank == 1 and fault in ("sleeps", "is slow"):
        from lumina.train.feed import Feed

        read, steps, woke = Feed._read, [], []

        def sleepy(self, batches):
            steps.append(0)
            if fault == "is slow":
                # Most of the time, however long the rest of a step takes here.
                time.sleep(max(0.1, 4 * (time.monotonic() - woke[-1])) if woke else 0.1)
                woke.append(time.monotonic())
            elif len(steps) == 3:
                (folder / "judge").touch()
                time.sleep(600)
            return read(self, batches)

        Feed._read = sleepy
    if rank == 1 and fault == "skips":
        from lumina.parallel.mesh import Mesh

        total = Mesh.sum

        def skipping(self, values):
            if self.activity.at[0] != 3:
                return total(self, values)
            (folder / "judge").touch()
            return list(map(float, values))

        Mesh.sum = skipping
    train_tree(rank, tree)


def judge_from_the_fault_on(rank: int, folder: Path) -> None:
    """Before it a rank may stand still on a busy machine for longer than the timeout, which is short here.

    Whoever puts the fault in makes `folder`/judge. What keeps a thread that judges from doing so is noted: the longest
    time from one judgement to the next, beyond half a second.
    """
    judge, last, longest = watchdog.Watchdog._judge, [], [0.5]

    def from_the_fault_on(self, now, started):
        if (folder / "judge").exists():
            longest.append(now - last[-1] if last else 0.0)
            last.append(now)
            (folder / f"late_{rank}").write_text(str(max(longest) - 0.5))
            judge(self, now, started)

    watchdog.Watchdog._judge = from_the_fault_on


class Run:
    """Ranks that train until they are ended."""

    def __init__(self, world, digits, folder, fault="", **changes):
        folder.mkdir(exist_ok=True)
        self.folder, self.run_dir = folder, folder / "run"
        changes = {"train__steps": FOREVER, "watchdog__timeout": TIMEOUT} | changes
        tree = tiny_config(self.run_dir, digits, **changes)
        self.ranks, self._queue = start_ranks(world, faulty, tree, fault, folder, port=free_port())

    def steps(self):
        """How many are in the metrics, in whole lines."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_step(self, step):
        deadline = time.monotonic() + PATIENCE
        while self.steps() < step:
            assert time.monotonic() < deadline
            assert all(rank.is_alive() for rank in self.ranks)
            time.sleep(0.02)

    def judge(self):
        """From now on."""
        (self.folder / "judge").touch()

    def late(self, rank):
        """Seconds for which the machine kept a rank from judging."""
        return float((self.folder / f"late_{rank}").read_text())

    def end(self, stopped=()):
        """Exit codes; stopped ranks are killed once the others have ended."""
        for number, rank in enumerate(self.ranks):
            if number not in stopped:
                rank.join(PATIENCE)
        for number in stopped:
            self.ranks[number].kill()
            self.ranks[number].join()
        return [rank.exitcode for rank in self.ranks]

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


@pytest.fixture
def start(digits, tmp_path):
    """`start(world, fault, …)`: a `Run`, of which nothing is left after the test."""
    runs = []

    def started(world, fault="", **changes):
        runs.append(Run(world, digits, tmp_path, fault, **changes))
        return runs[-1]

    yield started
    for rank in (rank for run in runs for rank in run.ranks):
        rank.kill()
        rank.join()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(start, victim):
    run = start(2)
    run.wait_for_step(3)
    pid = run.ranks[victim].pid
    run.judge()
    os.kill(pid, signal.SIGSTOP)
    codes = run.end(stopped=[victim])
    assert codes[1 - victim] == HANG
    (told,) = run.told
    assert f"rank {victim} (host {os.uname().nodename}, pid {pid}, pipeline stage 0) has not been heard of for" in told
    assert re.search(rf"waiting: rank {1 - victim} in all_\w+ \(called at \S+:\d+ in \w+", told)
    assert str(run.hang) in told
    report = run.report
    assert (report["kind"], report["ranks"], report["answered"]) == ("silent", [victim], [1 - victim])
    # By the clock of the one that notices it, on which a time in which that one is kept from running does not count.
    assert TIMEOUT < report["heartbeats"][victim]["heard_seconds_ago"] < TIMEOUT + 2
    assert report["heartbeats"][1 - victim]["collective"].startswith("all_")
    assert [path.name for path in run.hang.glob("rank_*")] == [f"rank_{1 - victim:05d}.txt"]
    stacks = (run.hang / f"rank_{1 - victim:05d}.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert "in _train" in stacks


def test_a_stopped_stage_of_a_pipeline(start):
    """Of four ranks; the others wait for it where they are, in messages and in sums."""
    run = start(4, parallel__pipeline=2)
    run.wait_for_step(3)
    run.judge()
    os.kill(run.ranks[2].pid, signal.SIGSTOP)
    codes = run.end(stopped=[2])
    assert [codes[rank] for rank in (0, 1, 3)] == [HANG] * 3
    (told,) = run.told
    assert f"rank 2 (host {os.uname().nodename}, pid {run.ranks[2].pid}, pipeline stage 1) has not been" in told
    assert (run.report["ranks"], run.report["answered"]) == ([2], [0, 1, 3])
    assert all(run.report["heartbeats"][rank]["waits"] for rank in (0, 1, 3))
    assert [beat["stage"] for beat in run.report["heartbeats"]] == [0, 0, 1, 1]


def test_a_rank_that_sleeps_in_its_data(start):
    run = start(2, "sleeps")
    assert run.end() == [HANG, HANG]
    (told,) = run.told
    idle = re.search(r"rank 1 \(.*\) has made no progress for (.+) s; it is at step 3, waiting for data, at", told)
    assert TIMEOUT <= float(idle[1]) < TIMEOUT + 2 + run.late(0)
    assert "waiting: rank 0 in all_" in told
    assert (run.report["kind"], run.report["ranks"], run.report["answered"]) == ("stuck", [1], [0, 1])
    assert "sleepy" in (run.hang / "rank_00001.txt").read_text()


def test_a_rank_that_skips_a_collective(start):
    run = start(2, "skips")
    assert run.end() == [HANG, HANG]
    (told,) = run.told
    assert "calls that do not match: rank 0 in all_reduce (called at lumina/parallel/mesh.py:" in told
    # The first sum of a step is that of whether it is refused; DeepSpeed takes the norm next.
    assert re.search(r" in sum[^;]*\) of step 3, the optimizer step; rank 1 in all_\w+ \(.*norm.*\) of step 3", told)
    assert run.report["kind"] == "mismatch"
    calls = [beat["calls"]["world"] for beat in run.report["heartbeats"]]
    assert calls[0] == calls[1] + 1


def test_ranks_that_were_all_held_up_go_on(start):
    """As by Ctrl-Z and fg: for longer than the timeout nobody ran, and nobody is to blame."""
    timeout = 2 * TIMEOUT  # in which this process must come to stop, and wake, the second after the first
    run = start(2, watchdog__timeout=timeout)
    run.wait_for_step(3)
    run.judge()
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(timeout + 1)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGCONT)
        time.sleep(0.7)  # the first could blame the last by now
    run.wait_for_step(run.steps() + 20)
    time.sleep(1)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert run.end() == [0, 0]
    assert run.told == []


def test_a_slow_rank_is_named_in_the_metrics(start):
    run = start(2, "is slow", watchdog__timeout=PATIENCE)
    run.judge()
    deadline, named = time.monotonic() + PATIENCE, []
    while not named and time.monotonic() < deadline:
        time.sleep(0.5)
        path = run.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        named = [line for line in map(json.loads, lines) if line["slowest_rank"] is not None]
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert run.end() == [0, 0]
    assert {line["slowest_rank"] for line in named} == {1}
    assert named[-1]["slowest_ratio"] > 1.5
    assert run.told == []
    assert not (run.run_dir / "hangs").exists()
