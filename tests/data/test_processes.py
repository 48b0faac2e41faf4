"""Jobs over processes: each once, errors as in this process, and a death is said."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina.data.processes import run_jobs, usable_cores


def job(number: int, report: Callable[[int], object]) -> tuple[int, int]:
    report(number)
    if number == 71:
        raise ValueError("71 is refused")
    if number == 72:
        raise KeyError("72")
    if number == 73:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_each_job_once(workers: int) -> None:
    reported = []
    done = dict(run_jobs(job, range(10, 30), workers, reported.append))
    assert {number: result[0] for number, result in done.items()} == {i: (10 + i) ** 2 for i in range(20)}
    assert sum(reported) == sum(range(10, 30))
    processes = {result[1] for result in done.values()}
    assert (processes == {os.getpid()}) == (workers == 1)
    assert len(processes) <= min(workers, 20)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (71, ValueError, "71 is refused"),
        (72, RuntimeError, "a worker process failed: KeyError: '72'"),
        (73, RuntimeError, "a worker process died (exit code -9); was it out of memory? run again with fewer workers"),
    ],
)
def test_errors(number: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        list(run_jobs(job, [1, number, 2], 2, lambda count: None))
    assert str(raised.value) == message


def test_a_long_job_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, sys, time\n"
        "from multiprocessing import forkserver\n"
        "from lumina.data.processes import run_jobs\n"
        "def job(number, report):\n"
        "    report(os.getpid())\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    forkserver.ensure_running()\n"  # before it is told to import all that indexing needs
        "    list(run_jobs(job, [1, 2], 2, lambda pid: print(pid, flush=True)))\n"
    )
    caller = subprocess.Popen([sys.executable, str(tmp_path / "sleeper.py")], stdout=subprocess.PIPE, text=True)
    pids = [int(caller.stdout.readline()) for _ in range(2)]
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 600
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their caller"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_to_do_and_bad_numbers() -> None:
    assert list(run_jobs(job, [], 4, print)) == []
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        list(run_jobs(job, [1], 0, print))
    assert 1 <= usable_cores() <= os.cpu_count()
