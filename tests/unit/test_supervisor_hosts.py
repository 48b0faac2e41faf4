"""What the supervisor orders as hosts come and go, with hosts that answer as a test has them."""

import signal
from pathlib import Path

import pytest

from lumina.config.exits import BAD_INPUT, CRASH_LOOP, DONE, FAILED
from lumina.launch import supervisor
from lumina.launch.hostfile import Host
from lumina.launch.hosts import LocalHost, Lost, _last_line
from lumina.launch.messages import End, Ended, Forget, Over, Prepare, Prepared, Refused, Signal, Start
from lumina.launch.supervisor import Supervisor

A, B, C = (Host(name, (0, 1)) for name in "abc")


class Hosts(LocalHost):
    """`answer(hosts, host, order)` gives what an order leads to, as (host, event) pairs."""

    def __init__(self, *hosts, answer):
        self.all, self._there, self._answer = list(hosts), list(hosts), answer
        self.orders, self._events = [], []
        self.starts, self.furthest, self.left_out = [], 0, []

    @property
    def there(self):
        return self._there

    def open(self, stopped):
        self.opened = True

    def close(self):
        self.opened = False

    def address(self, host):
        return f"address of {host.name}"

    def send(self, host, order):
        self.orders.append((host.name, order))
        if isinstance(order, Prepare):
            self.starts.append({})
        if isinstance(order, Start):
            self.starts[-1][host.name] = order
        if isinstance(order, End):
            self._events.append((host, Over(self.furthest, 0)))
        self._events += self._answer(self, host, order) or []

    def put_off(self, host, why):
        self.left_out.append((host.name, why))
        if host in self.there:
            self.there.remove(host)

    def lose(self, host):
        self.there.remove(host)
        return host, Lost("gone")

    def poll(self):
        events, self._events = self._events, []
        return events


def prepared(number=0):
    return Prepared(number, "logs", 29_500, 0, 0, False)


def ends(host, order, code=0):
    return [(host, Ended(rank, 1, code, "")) for rank in range(order.first, order.first + order.count)]


def run(hosts, restarts=3, fits=lambda world: True):
    return Supervisor(hosts, ["-m", "train"], Path("run"), restarts, fits).run()


def test_ranks_are_numbered_over_hosts():
    def answer(hosts, host, order):
        return [(host, prepared())] if isinstance(order, Prepare) else isinstance(order, Start) and ends(host, order)

    hosts = Hosts(A, Host("b", (1,), all_slots=False), C, answer=answer)
    assert run(hosts) == DONE
    (starts,) = hosts.starts
    assert [(starts[n].first, starts[n].count, starts[n].world, starts[n].slots) for n in "abc"] == [
        (0, 2, 5, None),
        (2, 1, 5, [1]),
        (3, 2, 5, None),
    ]
    assert {(start.master_address, start.master_port) for start in starts.values()} == {("address of a", 29_500)}
    assert all(start.shared for start in starts.values())
    assert not hosts.opened


@pytest.mark.parametrize("lost", [A, B])
def test_a_host_that_is_lost_before_its_ranks_are_started(lost, capsys):
    """No rank is started that would wait for it."""

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            gone = [hosts.lose(lost)] if len(hosts.starts) == 1 else []
            return [*gone, (host, prepared())]
        return isinstance(order, Start) and ends(host, order)

    hosts = Hosts(A, B, answer=answer)
    assert run(hosts) == DONE
    other = {A: "b", B: "a"}[lost]
    assert [list(starts) for starts in hosts.starts] == [[], [other]]
    assert (hosts.starts[1][other].world, hosts.starts[1][other].master_address) == (2, "127.0.0.1")
    assert capsys.readouterr().err == f"lumina launch: host {lost.name} is lost: gone\n"


def test_a_host_that_returns_takes_part_again_and_costs_no_restart(capsys):
    """The third attempt is on both, though one restart is all there was; a rank that had not begun is no failure."""

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared(len(hosts.starts)))]
        if isinstance(order, Start) and len(hosts.starts) == 1 and host == B:
            return [hosts.lose(B)]
        if isinstance(order, Start) and len(hosts.starts) == 2:
            hosts.there.append(B)
        if isinstance(order, Start) and len(hosts.starts) == 3:
            return ends(host, order)
        if order == Signal(signal.SIGTERM):
            return ends(host, hosts.starts[-1]["a"], -signal.SIGTERM)

    hosts = Hosts(A, B, answer=answer)
    assert run(hosts, restarts=1) == DONE
    assert [list(starts) for starts in hosts.starts] == [["a", "b"], ["a"], ["a", "b"]]
    assert capsys.readouterr().err.splitlines() == [
        "lumina launch: host b is lost: gone",
        "lumina launch: starting again from the beginning on a (restart 1 of at most 1)",
        "lumina launch: b: there again; the run is saved, and goes on with more hosts",
        "lumina launch: going on from the beginning on a, b",
    ]


def test_a_layout_chooses_the_hosts(capsys):
    """Of three, one is lost, and four ranks are none that the run can be laid out on: it goes on with one host."""

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared())]
        if isinstance(order, Start) and len(hosts.starts) == 1 and host == B:
            return [hosts.lose(B)]
        if isinstance(order, Start) and len(hosts.starts) == 2:
            return ends(host, order)

    hosts = Hosts(A, B, C, answer=answer)
    assert run(hosts, fits=lambda world: world in (2, 6)) == DONE
    assert [list(starts) for starts in hosts.starts] == [["a", "b", "c"], ["a"]]
    assert "starting again from the beginning on a (restart 1" in capsys.readouterr().err


def test_the_budget_is_spent(capsys):
    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared())]
        if isinstance(order, Start) and host == B:
            return ends(host, order, 1)

    hosts = Hosts(A, B, answer=answer)
    assert run(hosts, restarts=1) == FAILED
    assert len(hosts.starts) == 2
    assert "--max-restarts 1 are used up" in capsys.readouterr().err


def test_an_order_that_is_refused():
    hosts = Hosts(A, B, answer=lambda hosts, host, order: [(host, Refused("no space", bad_input=True))])
    with pytest.raises(ValueError, match="no space"):
        run(hosts)
    assert not hosts.opened


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ssh: no route\npdsh@a: b: ssh exited with exit code 255\n", "ssh: no route"),
        ("pdsh@a: b: ssh exited with exit code 255\n", ""),
        ("Welcome\n\nHost key verification failed.\r\n", "Host key verification failed."),
        ("sh: no python\n------\nPrimary job ended\nand so on\n------\n", "sh: no python"),
        ("------\nNot enough slots\nand so on\n------\n", "Not enough slots"),
        ("", ""),
    ],
)
def test_why_a_host_is_not_reached(tmp_path, words, told):
    (tmp_path / "words").write_text(words)
    assert _last_line(tmp_path / "words") == told


def test_a_signal_while_hosts_are_connected_to():
    """Nothing is started, and no folder made."""
    hosts = Hosts(A, B, answer=lambda *_: [])
    hosts.open = lambda stopped: (signal.raise_signal(signal.SIGTERM), hosts._events.append(stopped()))
    hosts.close = lambda: None
    assert run(hosts) == DONE
    assert hosts._events == [True]
    assert hosts.orders == []


def test_a_folder_that_a_host_refuses_is_left_as_it_was():
    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, Prepared(0, "logs", 29_500, 0, 0, True))]
        return [(host, Refused("not shared", bad_input=True))] if isinstance(order, Start) and host == B else []

    hosts = Hosts(A, B, answer=answer)
    with pytest.raises(ValueError, match="not shared"):
        run(hosts)
    assert hosts.orders[-2:] == [("a", Forget("run", 0)), ("b", Forget("run", 0))]


@pytest.mark.parametrize("how", ["ends", "refused", "lost"])
def test_a_host_that_returns_broken_does_not_end_the_run(capsys, how):
    """Its ranks find no data, or it cannot start them: it is left out, and costs neither a restart nor a try."""

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared(len(hosts.starts)))]
        number = len(hosts.starts)
        if isinstance(order, Start) and number == 1 and host == B:
            hosts.furthest = 7
            return [hosts.lose(B)]
        if isinstance(order, Start) and number in (2, 4, 6):
            hosts.furthest += number == 2
            hosts.there.append(B)
        if isinstance(order, Start) and number in (3, 5, 7) and host == B:
            if how == "lost":
                return [hosts.lose(B)]
            return ends(B, order, BAD_INPUT) if how == "ends" else [(B, Refused("no such folder", bad_input=True))]
        if isinstance(order, Start) and number == 8:
            return ends(host, order)
        if order == Signal(signal.SIGTERM):
            return ends(host, hosts.starts[-1]["a"], 0)

    hosts = Hosts(A, B, answer=answer)
    assert run(hosts, restarts=1) == DONE
    assert [list(starts) for starts in hosts.starts] == [["a", "b"], *[["a"], ["a", "b"]] * 3, ["a"]]
    assert hosts.left_out == [("b", "the run did not come to train with it")] * 3
    assert capsys.readouterr().err.count("lumina launch: without b, from the beginning on a") == 3


def test_what_was_accepted_before_and_is_refused_is_tried_again(monkeypatch, capsys):
    """As a lock that a file server keeps for a host that is gone; three times are the end nevertheless."""
    monkeypatch.setattr(supervisor, "_RELEASE_SECONDS", 0.1)
    refusals = 0

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared(len(hosts.starts)))]
        if isinstance(order, Start):
            if len(hosts.starts) == 1:
                hosts.furthest = 7
                return ends(host, order, 1)
            return ends(host, order, BAD_INPUT if len(hosts.starts) <= 1 + refusals else 0)

    for refusals, code in ((0, DONE), (2, DONE), (3, CRASH_LOOP)):
        hosts = Hosts(A, answer=answer)
        assert run(hosts, restarts=9) == code
        assert len(hosts.starts) == min(2 + refusals, 4)
        assert capsys.readouterr().err.count("what was accepted before is refused now") == min(refusals, 2)


def test_a_host_that_cannot_start_its_ranks_is_left_out(capsys):
    """After the run has trained with it: a disk that is full, say."""

    def answer(hosts, host, order):
        if isinstance(order, Prepare):
            return [(host, prepared(len(hosts.starts)))]
        number = len(hosts.starts)
        if isinstance(order, Start) and number == 1:
            hosts.furthest = 7
            return ends(host, order, 1)
        if isinstance(order, Start) and number == 2 and host == B:
            return [(B, Refused("no space left", bad_input=False))]
        if isinstance(order, Start) and number == 3:
            return ends(host, order)

    hosts = Hosts(A, B, answer=answer)
    assert run(hosts) == DONE
    assert hosts.left_out == [("b", "no space left")]
    assert [list(starts) for starts in hosts.starts] == [["a", "b"], ["a", "b"], ["a"]]
    assert "lumina launch: host b is left out for now: no space left\n" in capsys.readouterr().err
