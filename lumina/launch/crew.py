"""The ranks of one host as orders and events, whether the supervisor is in this process or on another host."""

import json
import re
import shutil
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from lumina.launch.messages import (
    End,
    Ended,
    Error,
    Forget,
    Line,
    Message,
    Over,
    Prepare,
    Prepared,
    Refused,
    Signal,
    Start,
)
from lumina.launch.ranks import LocalRanks, held_port

_ERROR = re.compile(r"lumina train: (?:rank \d+: )?")
_NOISE = re.compile(
    r"\[W\S* .*\[c10d\] The hostname of the client socket cannot be retrieved"
)  # where DNS has no names
_TAIL_BYTES = 65_536


class Crew:
    """Carries out orders on this host. `poll` tells what has happened since the last call, and never waits."""

    def __init__(self) -> None:
        self._ranks: LocalRanks | None = None
        self._tails: dict[int, Tail] = {}
        self._port: socket.socket | None = None
        self._run_dir = Path()
        self._erred = False

    def handle(self, order: Message) -> list[Message]:
        """Carry out an order; what there is to tell at once. `End` takes as long as its ranks."""
        try:
            return list(self._handle(order))
        except ValueError as error:
            return [Refused(str(error), bad_input=True)]
        except (RuntimeError, OSError) as error:
            return [Refused(str(error), bad_input=False)]

    def _handle(self, order: Message) -> Iterable[Message]:
        match order:
            case Prepare(run_dir):
                self._run_dir = Path(run_dir)
                fresh = not self._run_dir.exists()
                if self._port is not None:
                    self._port.close()
                self._port = held_port()
                number = _new_folder(self._run_dir)
                port = self._port.getsockname()[1]
                yield Prepared(number, str(_logs(run_dir, number)), port, *self._progress(), fresh)
            case Start(run_dir=run_dir, attempt=attempt, first=first):
                self._run_dir, self._erred = Path(run_dir), False
                logs = _logs(run_dir, attempt)
                if order.shared and not logs.is_dir():
                    raise ValueError(
                        f"run.dir={run_dir} on {socket.gethostname()} is not the folder that the first host has under "
                        "that name: name one on a file system that all hosts share, and see that it is mounted"
                    )
                logs.mkdir(parents=True, exist_ok=True)  # what is only measured shares no file system
                port, self._port = self._port, None
                self._ranks = LocalRanks(order, logs, port if first == 0 else None)
                self._tails = {rank.number: Tail(rank.log) for rank in self._ranks.all}
            case Signal(number):
                if self._ranks is not None:
                    self._ranks.signal(number)
            case End(grace):
                if self._ranks is not None:
                    self._ranks.end(grace)
                    yield from self.poll()
                    self._ranks, self._tails = None, {}
                yield Over(*self._progress())
            case Forget(run_dir, attempt):
                _remove_logs(_logs(run_dir, attempt))
            case _:
                raise AssertionError(order)

    def poll(self) -> list[Message]:
        """Which ranks have ended, those that a signal ended first; errors; and what rank 0 has written until one."""
        if self._ranks is None:
            return []
        newly = self._ranks.newly_ended()  # first: what they wrote before is then read below
        events: list[Message] = []
        for number, tail in self._tails.items():
            for line in tail.lines():
                if found := _ERROR.match(line):
                    self._erred = True
                    events.append(Error(number, line[found.end() :]))
                elif number == 0 and not self._erred:
                    events.append(Line(line))
        return events + [Ended(r.number, r.process.pid, r.code, self._tails[r.number].last) for r in newly]

    def close(self) -> None:
        """End what is left, at once.

        Raises:
            RuntimeError: where a process cannot be killed.
        """
        if self._ranks is not None:
            self._ranks.signal(signal.SIGKILL)
            self._ranks.end(0.0)
            self._ranks = None
        if self._port is not None:
            self._port.close()

    def _progress(self) -> tuple[int, int]:
        return furthest_step(self._run_dir), newest_checkpoint(self._run_dir)


class Tail:
    """Lines as they are added to a file."""

    def __init__(self, path: Path):
        self._path, self._offset, self._partial = path, 0, b""
        self.last = ""

    def lines(self) -> list[str]:
        """Those that have been completed since the last call; none of a file that is gone, which ends no run."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return []
        self._offset += len(added)
        *whole, self._partial = (self._partial + added).split(b"\n")
        lines = [line.decode(errors="replace").rstrip("\r") for line in whole]
        lines = [line for line in lines if not _NOISE.match(line)]
        self.last = next((line.strip() for line in reversed(lines) if line.strip()), self.last)
        return lines


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


def _logs(run_dir: str | Path, attempt: int) -> Path:
    return Path(run_dir) / "logs" / f"attempt_{attempt}"


def _new_folder(run_dir: Path) -> int:
    """A number whose folder was not there: those of earlier attempts stay."""
    number = 0
    while True:
        folder = _logs(run_dir, number)
        try:
            folder.mkdir(parents=True)
            return number
        except FileExistsError as error:
            if not folder.is_dir():
                raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror}") from error
            number += 1
        except OSError as error:
            raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror or error}") from error


def _remove_logs(logs: Path) -> None:
    """Those of one attempt, and the folders above them if nothing else is there: another run may have begun in them."""
    shutil.rmtree(logs, ignore_errors=True)
    for folder in (logs.parent, logs.parent.parent):
        try:
            folder.rmdir()
        except OSError:  # not empty, or another host has removed it
            return
