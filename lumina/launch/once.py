"""Ranks on hosts, started once and watched to their end: for what measures, and is not worth a second attempt."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lumina.launch.hostfile import Host
from lumina.launch.hosts import Fleet, LocalHost, Lost
from lumina.launch.messages import End, Ended, Error, Forget, Line, Message, Over, Prepare, Prepared, Refused, Start

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0
_GRACE_SECONDS = 1.0
_END_SECONDS = 15.0


@dataclass
class Outcome:
    """What became of them.

    lines: that rank 0 has written.
    why: what went wrong, in a sentence; empty if nothing did.
    """

    lines: list[str] = field(default_factory=list)
    why: str = ""


class _Once:
    def __init__(self, hosts: LocalHost | Fleet, folder: PurePosixPath):
        self.hosts, self.folder, self.outcome = hosts, str(folder), Outcome()
        self.living: set[int] = set()
        self.prepared: Prepared | None = None
        self.over: set[Host] = set()
        self.failed: list[tuple[str, Ended]] = []

    def note(self, events: Sequence[tuple[Host, Message]]) -> None:
        for host, event in events:
            match event:
                case Prepared():
                    self.prepared = event
                case Line(text):
                    self.outcome.lines.append(text)
                case Error(rank, text):
                    self.fail(f"rank {rank} on {host.name}: {text}")
                case Ended(rank):
                    self.living.discard(rank)
                    if event.code:
                        self.failed.append((host.name, event))
                case Lost(why):
                    self.over.add(host)
                    self.fail(f"host {host.name}: {why}")
                case Refused(text):
                    self.over.add(host)
                    self.fail(f"{host.name}: {text}")
                case Over():
                    self.over.add(host)

    def fail(self, why: str) -> None:
        self.outcome.why = self.outcome.why or why

    def wait(self, until, deadline: float) -> bool:
        """Whether `until()` came true before something failed or the time was over."""
        while not until():
            if self.outcome.why or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
            self.note(self.hosts.poll())
        return True


def run_once(
    hosts: LocalHost | Fleet,
    arguments: Sequence[str],
    folder: PurePosixPath,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run Python with `arguments` as the ranks of `hosts`, which are opened and closed here.

    Args:
        folder: a new one, on each host, for the ranks' output; it is removed.
        seconds: after which they are ended.
        environment: of every rank, on top of its host's.

    Raises:
        RuntimeError: naming each host that is not reached, and why.
    """
    try:
        hosts.open()
        return _run(_Once(hosts, folder), list(arguments), seconds, dict(environment or {}))
    finally:
        hosts.close()


def _run(once: _Once, arguments: list[str], seconds: float, environment: dict[str, str]) -> Outcome:
    hosts, using, deadline = once.hosts, once.hosts.all, time.monotonic() + seconds
    hosts.send(using[0], Prepare(once.folder))
    if not once.wait(lambda: once.prepared is not None, deadline):
        once.fail(f"{using[0].name} has not made the folder {once.folder}")
        return once.outcome
    world, first = sum(len(host.slots) for host in using), 0
    for host in using:
        order = Start(
            arguments=arguments,
            run_dir=once.folder,
            attempt=once.prepared.attempt,
            first=first,
            count=len(host.slots),
            world=world,
            master_address="127.0.0.1" if len(using) == 1 else hosts.address(using[0]),
            master_port=once.prepared.port,
            slots=None if host.all_slots else list(host.slots),
            environment=environment,
        )
        once.living |= set(range(first, first + len(host.slots)))
        first += len(host.slots)
        hosts.send(host, order)
    once.wait(lambda: not once.living or once.failed, deadline)
    if once.failed:  # others follow from it, and the one to name may end last
        once.wait(lambda: not once.living, min(deadline, time.monotonic() + _SETTLE_SECONDS))
    _end(once, using)
    if once.failed:
        killed = [entry for entry in once.failed if entry[1].code < 0]
        said = [entry for entry in once.failed if entry[1].last]
        host, ended = (said or killed or once.failed)[0]
        once.fail(f"rank {ended.rank} on {host} ended with {ended.code}: {ended.last}")
    elif once.living:
        once.fail(f"not done in {seconds:.0f} s: ranks {', '.join(map(str, sorted(once.living)))} still ran")
    return once.outcome


def _end(once: _Once, using: Sequence[Host]) -> None:
    still = set(once.living)
    for host in using:
        once.hosts.send(host, End(_GRACE_SECONDS))
    deadline = time.monotonic() + _GRACE_SECONDS + _END_SECONDS
    why, once.outcome.why = once.outcome.why, ""
    failed = list(once.failed)
    once.wait(lambda: once.over >= set(using), deadline)
    once.living, once.failed = still, failed  # how they end when they are told to tells nothing
    once.outcome.why = why or once.outcome.why
    for host in using:
        once.hosts.send(host, Forget(once.folder, once.prepared.attempt))
    for _ in range(4):  # the orders go out
        once.hosts.poll()
        time.sleep(_POLL_SECONDS)
