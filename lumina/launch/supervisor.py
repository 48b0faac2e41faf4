"""Restarts: a run whose ranks die goes on from its newest checkpoint, until it is done or it makes no sense."""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lumina.config.exits import BAD_INPUT, CRASH_LOOP, DONE, FAILED, HANG
from lumina.launch.console import Console, say
from lumina.launch.ranks import LocalRanks, Rank

FRUITLESS_LIMIT = 3
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0  # in which other ranks notice, and the error that theirs follow from is written
_GRACE_SECONDS = 1.5  # after that: without the others a rank has nothing to finish but to write its stacks
_TAIL_BYTES = 65_536


class Supervisor:
    """One run on this host, from its start to its end."""

    def __init__(self, world: int, command: Sequence[str], run_dir: Path, max_restarts: int):
        """`command` is that of every rank, and trains in `run_dir`."""
        self._world, self._command, self._run_dir, self._max_restarts = world, command, run_dir, max_restarts
        self._asked: list[int] = []
        self._passed_on = 0

    def run(self) -> int:
        """The exit code: that of `lumina train`, or `exits.CRASH_LOOP`.

        SIGTERM, SIGHUP and Ctrl-C are passed on to the ranks, which save and end; nothing is started again then.

        Raises:
            ValueError: where the run's folder cannot be written.
            RuntimeError: where ranks cannot be started or killed.
        """
        with self._listening():
            return self._run()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        # One that is ignored, as SIGHUP under nohup, stays so.
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda got, _: self._asked.append(got)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        fresh = not self._run_dir.exists()
        furthest, fruitless, restarts = furthest_step(self._run_dir), 0, 0
        while True:
            logs = _new_folder(self._run_dir)
            code = self._attempt(logs)
            if code == BAD_INPUT and fresh:
                _remove_logs(self._run_dir)
            if code in (DONE, BAD_INPUT) or self._asked:
                return code
            fresh, reached = False, furthest_step(self._run_dir)
            fruitless = 0 if reached > furthest else fruitless + 1
            furthest = max(furthest, reached)
            if fruitless >= FRUITLESS_LIMIT:
                say(f"{fruitless} attempts in a row came no further than step {furthest}: not tried again; see {logs}")
                return CRASH_LOOP
            if restarts == self._max_restarts:
                say(f"not tried again: --max-restarts {self._max_restarts} are used up; see {logs}")
                return code
            restarts += 1
            saved = newest_checkpoint(self._run_dir)
            whence = f"from the checkpoint of step {saved}" if saved else "from the beginning"
            say(f"starting again {whence} (restart {restarts} of at most {self._max_restarts})")

    def _attempt(self, logs: Path) -> int:
        ranks = LocalRanks(self._world, self._command, logs)
        try:
            return self._watch(ranks, Console(ranks.host, ranks.all))
        finally:
            ranks.end(_GRACE_SECONDS)

    def _watch(self, ranks: LocalRanks, console: Console) -> int:
        """Until all ranks have ended well, or the first has failed and the others have had a moment to."""
        failed: list[Rank] = []
        settled = float("inf")
        while time.monotonic() < settled:
            time.sleep(_POLL_SECONDS)
            self._pass_on(ranks)
            for rank in ranks.newly_ended():
                if self._asked and rank.code == -signal.SIGTERM:
                    say("stopped before training had begun, or after it was saved")
                    return DONE
                if rank.code:
                    failed.append(rank)
            if failed and settled == float("inf"):
                if failed[0].code < 0 and not console.errors:
                    # Nothing was wrong before: what others are going to say follows from it.
                    console.tell_end(failed[0])
                    return FAILED
                settled = time.monotonic() + _SETTLE_SECONDS
            console.follow()
            if not ranks.living:
                break
        if not failed:
            return DONE
        console.tell_cause(failed)
        codes = {rank.code for rank in failed}
        return next((code for code in (BAD_INPUT, HANG) if code in codes), FAILED)

    def _pass_on(self, ranks: LocalRanks) -> None:
        while self._passed_on < len(self._asked):
            number = self._asked[self._passed_on]
            self._passed_on += 1
            if self._passed_on > 2 and number == signal.SIGINT:
                raise KeyboardInterrupt
            ranks.signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def newest_checkpoint(run_dir: Path) -> int:
    """Its step; 0 where there is none."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.group(1)) for name in found if name), default=0)


def furthest_step(run_dir: Path) -> int:
    """The last step that a run has come to, by its metrics and its checkpoints; 0 where it has come to none."""
    path = run_dir / "metrics.jsonl"
    steps = [newest_checkpoint(run_dir)]
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
        steps += [step for step in map(_step_of, lines) if step is not None]
    return max(steps)


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the beginning of the stretch that was read, or cut short by a kill
        return None


def _new_folder(run_dir: Path) -> Path:
    """For the logs of an attempt: those of earlier ones stay."""
    logs = run_dir / "logs"
    number = 0
    while True:
        folder = logs / f"attempt_{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not folder.is_dir():
                raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror}") from error
            number += 1
        except OSError as error:
            raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror or error}") from error


def _remove_logs(run_dir: Path) -> None:
    """After bad input nothing is left behind; they say no more than was shown."""
    shutil.rmtree(run_dir / "logs")
    if not any(run_dir.iterdir()):
        run_dir.rmdir()
