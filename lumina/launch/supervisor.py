"""Restarts: a run whose ranks die goes on from its newest checkpoint, until it is done or it makes no sense."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lumina.config.exits import BAD_INPUT, CRASH_LOOP, DONE, FAILED, HANG
from lumina.launch.console import Console, Said, say, tell_end
from lumina.launch.hostfile import Host, largest_fitting
from lumina.launch.hosts import Fleet, LocalHost, Lost
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

FRUITLESS_LIMIT = 3
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0  # in which other ranks notice, and the error that theirs follow from is written
_GRACE_SECONDS = 1.5  # after that: without the others a rank has nothing to finish but to write its stacks
_ANSWER_SECONDS = 60.0  # a folder on a slow file system is made in it
_END_SECONDS = 15.0
_RELEASE_SECONDS = 60.0  # two of them are longer than a file server keeps the locks of a client that is gone


class _StoppedEarlyError(Exception):
    """A signal came before there was anything to pass it on to."""


@dataclass
class _Attempt:
    """Ranks on hosts, and what has become of them."""

    prepared: Prepared
    first_of: dict[Host, int]
    living: set[int] = field(default_factory=set)
    failed: list[tuple[str, Ended]] = field(default_factory=list)
    refused: tuple[Host, Refused] | None = None
    lost: dict[str, str] = field(default_factory=dict)
    widening: bool = False
    """Whether it was asked to end so that a host that is back takes part."""


class Supervisor:
    """One run, from its start to its end, on this host or several."""

    def __init__(
        self,
        hosts: LocalHost | Fleet,
        arguments: Sequence[str],
        run_dir: Path,
        max_restarts: int,
        fits: Callable[[int], bool] = lambda world: True,
        environment: Mapping[str, str] | None = None,
    ):
        """
        Args:
            hosts: opened and closed here.
            arguments: of Python, for every rank.
            run_dir: in which they train.
            fits: whether the run can be laid out on so many ranks.
            environment: of every rank, on top of its host's.
        """
        self._hosts, self._arguments, self._run_dir, self._max_restarts = hosts, list(arguments), run_dir, max_restarts
        self._fits, self._environment = fits, dict(environment or {})
        self._asked: list[int] = []
        self._passed_on = 0
        self._furthest = self._saved = 0

    def run(self) -> int:
        """The exit code: that of `lumina train`, or `exits.CRASH_LOOP`.

        SIGTERM, SIGHUP and Ctrl-C are passed on to the ranks, which save and end; nothing is started again then.

        Raises:
            ValueError: where the run's folder cannot be written.
            RuntimeError: where hosts cannot be reached, and ranks not be started or killed.
        """
        with self._listening():
            try:
                self._hosts.open(lambda: bool(self._asked))
                return DONE if self._asked else self._run()
            except _StoppedEarlyError:
                return DONE
            finally:
                self._hosts.close()

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
        fruitless = restarts = 0
        using, fresh, before = self._hosts.all, None, None
        trained, proven = False, set[Host]()  # whether the run has come to train, and hosts that did last
        while True:
            attempt = self._prepare(using)
            if attempt is None:
                using = self._next_hosts()
                continue
            fresh = attempt.prepared.fresh if fresh is None else fresh
            if before is None:
                before = self._furthest = max(self._furthest, attempt.prepared.furthest)
            code = self._attempt(attempt)
            logs = attempt.prepared.logs
            if code == BAD_INPUT and fresh:
                for host in using:
                    self._hosts.send(host, Forget(str(self._run_dir), attempt.prepared.attempt))
            if self._asked or (code == DONE and not attempt.widening):
                return code
            gained = self._furthest > before or attempt.widening
            before, newcomers = self._furthest, set(using) - proven
            if gained:
                trained, proven = True, {host for host in using if host.name not in attempt.lost}
            elif proven and newcomers:
                # It trained without them: a file system that is not mounted there, a broken device.
                for host in newcomers:
                    self._hosts.put_off(host, "the run did not come to train with it")
                using = self._next_hosts(attempt)
                say(f"without {', '.join(sorted(host.name for host in newcomers))}, {self._whence(using)}")
                continue
            if attempt.refused is not None:
                host, refused = attempt.refused
                if not trained:
                    raise (ValueError if refused.bad_input else RuntimeError)(refused.text)
                self._hosts.put_off(host, refused.text)
                say(f"host {host.name} is left out for now: {refused.text}")
            if code == BAD_INPUT and not trained:
                return code
            fresh = False
            fruitless = 0 if gained else fruitless + 1
            if fruitless >= FRUITLESS_LIMIT:
                say(f"{fruitless} attempts in a row came no further than step {before}: not tried again; see {logs}")
                return CRASH_LOOP
            if attempt.widening and code == DONE:
                using = self._next_hosts(attempt)
                say(f"going on {self._whence(using)}")
                continue
            if restarts == self._max_restarts:
                say(f"not tried again: --max-restarts {self._max_restarts} are used up; see {logs}")
                return code
            restarts += 1
            if code == BAD_INPUT:
                # What trained before is refused now: a lock of a host that has died, say, which a file server keeps.
                say(f"what was accepted before is refused now: waiting {_RELEASE_SECONDS:.0f} s")
                self._rest(attempt, _RELEASE_SECONDS)
            using = self._next_hosts(attempt)
            say(f"starting again {self._whence(using)} (restart {restarts} of at most {self._max_restarts})")

    def _rest(self, attempt: _Attempt, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._wait(attempt)

    def _whence(self, using: Sequence[Host]) -> str:
        step = f"from the checkpoint of step {self._saved}" if self._saved else "from the beginning"
        return step + (f" on {', '.join(host.name for host in using)}" if len(self._hosts.all) > 1 else "")

    def _next_hosts(self, attempt: _Attempt | None = None) -> list[Host]:
        """Those to go on with: as many as are there and a run fits on; waits for them if it fits on none."""
        told = False
        while not (using := largest_fitting(self._hosts.there, self._fits)):
            if not told:
                there = ", ".join(host.name for host in self._hosts.there) or "none"
                say(f"the layout does not fit on the hosts that are left ({there}): waiting for others to return")
                told = True
            self._wait(attempt)
        return using

    def _wait(self, attempt: _Attempt | None = None) -> list[tuple[Host, Message]]:
        if self._asked:
            raise _StoppedEarlyError
        time.sleep(_POLL_SECONDS)
        events = self._hosts.poll()
        if attempt is not None:
            self._note(attempt, Console(), events)
        return events

    def _prepare(self, using: Sequence[Host]) -> _Attempt | None:
        """None where a host was lost meanwhile."""
        self._hosts.send(using[0], Prepare(str(self._run_dir)))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            events = self._wait()
            if lost := [(host.name, event.why) for host, event in events if isinstance(event, Lost) and host in using]:
                for name, why in lost:
                    say(f"host {name} is lost: {why}")
                return None
            for host, event in events:
                if host == using[0]:
                    match event:
                        case Prepared():
                            self._saved = max(self._saved, event.saved)
                            counts = [len(one.slots) for one in using]
                            firsts = [sum(counts[:index]) for index in range(len(counts))]
                            return _Attempt(event, dict(zip(using, firsts, strict=True)))
                        case Refused(text, bad_input=True):
                            raise ValueError(text)
                        case Refused(text):
                            self._hosts.put_off(host, text)
                            say(f"host {host.name} is left out for now: {text}")
                            return None
        why = f"it has not made a folder in {self._run_dir} for {_ANSWER_SECONDS:.0f} s"
        self._hosts.put_off(using[0], why)
        say(f"host {using[0].name} is left out for now: {why}")
        return None

    def _attempt(self, attempt: _Attempt) -> int:
        using, console = list(attempt.first_of), Console()
        world = sum(len(host.slots) for host in using)
        for host, first in attempt.first_of.items():
            attempt.living |= set(range(first, first + len(host.slots)))
            order = Start(
                arguments=self._arguments,
                run_dir=str(self._run_dir),
                attempt=attempt.prepared.attempt,
                first=first,
                count=len(host.slots),
                world=world,
                master_address="127.0.0.1" if len(using) == 1 else self._hosts.address(using[0]),
                master_port=attempt.prepared.port,
                slots=None if host.all_slots else list(host.slots),
                environment=self._environment,
                shared=len(using) > 1,
            )
            self._hosts.send(host, order)
        try:
            return self._watch(attempt, console)
        finally:
            self._end(attempt, console)

    def _watch(self, attempt: _Attempt, console: Console) -> int:
        """Until all ranks have ended well, or the first has failed and the others have had a moment to."""
        settled = float("inf")
        while time.monotonic() < settled:
            time.sleep(_POLL_SECONDS)
            self._pass_on(attempt)
            self._note(attempt, console, self._hosts.poll())
            failed = attempt.failed
            if (self._asked or attempt.widening) and any(ended.code == -signal.SIGTERM for _, ended in failed):
                if self._asked:
                    say("stopped before training had begun, or after it was saved")
                return DONE
            if attempt.lost or attempt.refused is not None:
                break
            if failed and settled == float("inf"):
                if failed[0][1].code < 0 and not console.errors and len(attempt.first_of) == 1:
                    # Nothing was wrong before: what others are going to say follows from it.
                    tell_end(*failed[0])
                    return FAILED
                settled = time.monotonic() + _SETTLE_SECONDS
            if not attempt.living:
                break
            self._widen(attempt)
        if attempt.refused is not None:
            return BAD_INPUT if attempt.refused[1].bad_input else FAILED
        if attempt.lost:
            for name, why in attempt.lost.items():
                say(f"host {name} is lost: {why}")
            return FAILED
        if not attempt.failed:
            return DONE
        console.tell_cause(attempt.failed)
        codes = {ended.code for _, ended in attempt.failed}
        return next((code for code in (BAD_INPUT, HANG) if code in codes), FAILED)

    def _note(self, attempt: _Attempt, console: Console, events: Sequence[tuple[Host, Message]]) -> None:
        # Of ranks that have ended between two looks, those that a signal ended come first: others follow from it.
        for host, event in sorted(events, key=lambda entry: isinstance(entry[1], Ended) and entry[1].code >= 0):
            match event:
                case Line(text):
                    console.show(text)
                case Error(rank, text):
                    console.errors.append(Said(host.name, rank, text))
                case Ended(rank, _, code):
                    attempt.living.discard(rank)
                    if code:
                        attempt.failed.append((host.name, event))
                case Refused():
                    attempt.refused = attempt.refused or (host, event)
                case Lost(why) if host in attempt.first_of:
                    attempt.lost[host.name] = why
                case Over(furthest, saved):
                    self._furthest, self._saved = max(self._furthest, furthest), max(self._saved, saved)

    def _end(self, attempt: _Attempt, console: Console) -> None:
        """All ranks, and whatever they had started. A host that does not answer ends them by itself."""
        waiting = {host for host in attempt.first_of if host.name not in attempt.lost}
        for host in waiting:
            self._hosts.send(host, End(_GRACE_SECONDS))
        deadline = time.monotonic() + _GRACE_SECONDS + _END_SECONDS
        while waiting and time.monotonic() < deadline:
            events = self._hosts.poll()
            self._note(attempt, console, events)
            for host, event in events:
                if isinstance(event, Over | Lost | Refused):
                    waiting.discard(host)
            time.sleep(_POLL_SECONDS)
        for host in waiting:
            why = f"its ranks have not ended for {_GRACE_SECONDS + _END_SECONDS:.0f} s"
            self._hosts.put_off(host, why)
            attempt.lost[host.name] = why
            say(f"host {host.name} is left out for now: {why}")

    def _widen(self, attempt: _Attempt) -> None:
        """Ask the ranks to save and end where a run fits on more hosts than it has."""
        if attempt.widening or self._asked or len(self._hosts.there) <= len(attempt.first_of):
            return
        larger = largest_fitting(self._hosts.there, self._fits)
        if len(larger) > len(attempt.first_of):
            back = ", ".join(host.name for host in larger if host not in attempt.first_of)
            say(f"{back}: there again; the run is saved, and goes on with more hosts")
            attempt.widening = True
            self._send_all(attempt, Signal(signal.SIGTERM))

    def _pass_on(self, attempt: _Attempt) -> None:
        while self._passed_on < len(self._asked):
            number = self._asked[self._passed_on]
            self._passed_on += 1
            if self._passed_on > 2 and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._send_all(attempt, Signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))

    def _send_all(self, attempt: _Attempt, order: Message) -> None:
        for host in attempt.first_of:
            self._hosts.send(host, order)
