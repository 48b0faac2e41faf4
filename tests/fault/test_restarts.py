"""`lumina launch` over real runs: ranks that die or stop, and a supervisor that is killed itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.parallel.runs import metrics_of, tiny_config, train_on
from tests.parallel.workers import PATIENCE

pytestmark = pytest.mark.slow
TIMEOUT = 15.0
"""Of the watchdog: no rank that nothing is wrong with stands still for so long, on a busy machine either."""


class Launched:
    """A `lumina launch` of two ranks."""

    def __init__(self, folder: Path, tree: dict):
        self.run_dir = Path(tree["run"]["dir"])
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(tree))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lumina", "launch", "--ranks", "2", str(config)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # Ignored where the tests run in the background of a shell, and then by what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_step(self, step: int) -> float:
        """When it was reached."""
        deadline = time.monotonic() + PATIENCE
        while _last_step(self.run_dir) < step:
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)
        return time.monotonic()

    def wait_for_attempt(self, number: int) -> float:
        """When it was begun."""
        deadline = time.monotonic() + PATIENCE
        while not (self.run_dir / "logs" / f"attempt_{number}" / "rank_00001.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return time.monotonic()

    def rank(self, number: int) -> int:
        """The process of a rank."""
        ranks = psutil.Process(self.process.pid).children()
        return next(rank.pid for rank in ranks if rank.environ()["RANK"] == str(number))

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        """A test that fails leaves no run behind that would go on beside the others."""
        self.process.kill()
        self.process.wait()


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _of_the_run(folder: Path) -> list[psutil.Process]:
    """Every process of a test's run: those that name its folder, and what they have started."""
    named = [
        p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or [])
    ]
    found = list(named)
    for process in named:
        try:
            found += process.children(recursive=True)
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return found


def test_a_killed_and_a_stopped_rank(digits, tmp_path):
    """The losses of a run that met both are those of one that met neither."""
    changes = {"train__steps": 100_000, "checkpoint__every": 10, "watchdog__timeout": TIMEOUT}
    with Launched(tmp_path, tiny_config(tmp_path / "run", digits, **changes)) as launched:
        launched.wait_for_step(15)
        killed = launched.rank(1)
        os.kill(killed, signal.SIGKILL)
        started = launched.wait_for_attempt(1)
        launched.wait_for_step(_last_step(launched.run_dir) + 15)
        resumed = time.monotonic()
        stopped = launched.rank(0)
        os.kill(stopped, signal.SIGSTOP)
        launched.wait_for_attempt(2)
        launched.wait_for_step(_last_step(launched.run_dir) + 15)
        launched.process.send_signal(signal.SIGINT)  # as Ctrl-C does
        code, said = launched.end()
    assert _of_the_run(tmp_path) == []
    print(f"15 more steps {resumed - started:.1f} s after the restart")
    told = [line.removeprefix("lumina launch: ") for line in said.splitlines() if line.startswith("lumina launch: ")]
    host = os.uname().nodename
    assert (code, len(told)) == (0, 4), said
    assert "asked to stop: saved after step" in said
    assert told[0].startswith(f"rank 1 on {host} (pid {killed}) was ended by SIGKILL")
    assert "starting again from the checkpoint of step " in told[1]
    assert told[2].startswith(f"rank 1 on {host}: rank 0 (host {host}, pid {stopped}, pipeline stage 0) has not been h")
    assert "starting again from the checkpoint of step " in told[3]
    assert not psutil.pid_exists(stopped)
    assert len(list((launched.run_dir / "hangs").glob("*/rank_00001.txt"))) == 1
    losses = [line["loss"] for line in metrics_of(launched.run_dir)]
    unbroken = tmp_path / "unbroken"
    train_on(2, tiny_config(unbroken, digits, train__steps=len(losses)))
    assert [line["loss"] for line in metrics_of(unbroken)] == losses


def test_no_process_outlives_a_killed_supervisor(digits, tmp_path):
    """Nor what ranks have started to read data."""
    tree = tiny_config(tmp_path / "run", digits, train__steps=100_000, data__workers=1)
    with Launched(tmp_path, tree) as launched:
        launched.wait_for_step(3)
        processes = psutil.Process(launched.process.pid).children(recursive=True)
        assert len(processes) >= 2 * 3  # ranks, their fork servers and the processes that read
        launched.process.kill()
        launched.end()
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    assert alive == []
    assert _of_the_run(tmp_path) == []
