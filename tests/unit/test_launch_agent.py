"""What an agent, its crew and the console do when a disk is slow, a folder is shared or nobody reads what they say."""

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lumina.launch import agent, messages, transport
from lumina.launch.console import Console, say
from lumina.launch.crew import Crew
from lumina.launch.hostfile import Host
from lumina.launch.hosts import Fleet
from lumina.launch.messages import Beat, Channel, Forget, Prepare, Prepared, Refused, Start

PATIENCE = 600.0
"""Seconds after which something hangs."""


@pytest.fixture
def channels():
    """Two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = Channel(socket.create_connection(listener.getsockname()))
        other = Channel(listener.accept()[0])
    yield one, other
    one.close()
    other.close()


def test_an_order_that_takes_long_is_no_silence(channels, monkeypatch):
    """A folder on a slow file system takes longer than an agent goes on unheard of; on a clock of its own."""
    mine, theirs = channels
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(agent, "time", clock)
    monkeypatch.setattr(messages, "time", clock)
    monkeypatch.setattr(agent.signal, "signal", lambda *_: None)
    handled, over, told = [], threading.Event(), []

    def handle(crew, order):
        handled.append(order.run_dir)
        assert over.wait(PATIENCE)
        return [Prepared(0, order.run_dir, 1, 0, 0, False)]

    monkeypatch.setattr(Crew, "handle", handle)

    def until(condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def supervise():
        theirs.send(Prepare("first"))
        until(lambda: handled)
        for _ in range(4):
            now[0] += 0.7 * agent._ALONE_SECONDS
            theirs.send(Beat())
            until(lambda: mine.heard == now[0])
        over.set()
        until(lambda: told.extend(theirs.receive()) or told)
        over.clear()
        theirs.send(Prepare("second"))
        until(lambda: len(handled) == 2)
        theirs.send(Prepare("last"))
        theirs.close()
        until(lambda: mine.closed)
        over.set()

    with ThreadPoolExecutor(1) as pool:
        supervisor = pool.submit(supervise)
        supervisor.add_done_callback(lambda _: (over.set(), theirs.close()))
        assert agent._serve(mine) == 0
        supervisor.result()
    assert [event.logs for event in told] == ["first"]
    # What was sent before the end is done, too: Forget is.
    assert handled == ["first", "second", "last"]


def test_an_agent_ends_when_it_hears_nothing(channels, monkeypatch):
    monkeypatch.setattr(agent, "_ALONE_SECONDS", 0.3)
    monkeypatch.setattr(agent.signal, "signal", lambda *_: None)
    assert agent._serve(channels[0]) == 0


def test_logs_of_another_attempt_are_not_forgotten(tmp_path):
    """Two that are launched into one folder at once: the one that is refused leaves the other's alone."""
    crew, run = Crew(), tmp_path / "run"
    (ours,) = crew.handle(Prepare(str(run)))
    assert ours.fresh
    other = run / "logs" / f"attempt_{ours.attempt + 1}"
    other.mkdir()
    assert crew.handle(Forget(str(run), ours.attempt)) == []
    assert list((run / "logs").iterdir()) == [other]
    crew.handle(Forget(str(run), ours.attempt + 1))
    crew.handle(Forget(str(run), ours.attempt + 1))  # by another host of the same file system
    assert list(tmp_path.iterdir()) == []
    crew.close()


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """Before a step is trained whose checkpoint could not be written."""
    run = tmp_path / "run"
    run.mkdir()

    def start(shared):
        crew = Crew()
        told = crew.handle(Start([], str(run), 0, 2, 0, 2, "a", 29_500, shared=shared))
        crew.close()
        return told

    (refused,) = start(shared=True)
    assert isinstance(refused, Refused)
    assert refused.bad_input
    assert f"run.dir={run} on {socket.gethostname()} is not the folder that the first host has" in refused.text
    assert list(run.iterdir()) == []
    assert start(shared=False) == []
    assert start(shared=True) == []


def test_connecting_is_given_up_when_asked_to(monkeypatch):
    monkeypatch.setattr(transport, "command_on", lambda *_: ["sleep", "600"])
    fleet = Fleet([Host("nobody.invalid", (0,))], "ssh")
    asked = iter([False, False])
    fleet.open(lambda: next(asked, True))
    process = fleet._links["nobody.invalid"].process
    assert process.poll() is None
    fleet.close()
    assert process.returncode == -9  # it was not waited for


class Gone:
    """A terminal that is closed."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


def test_ranks_are_not_given_up_because_nobody_reads(monkeypatch):
    """As after Ctrl-C in `lumina launch … |& tee log`, which ends tee while the ranks save."""
    monkeypatch.setattr(sys, "stderr", Gone())
    Console().show("step 1")
    say("a sentence")
    assert not isinstance(sys.stderr, Gone)
    sys.stderr.close()
