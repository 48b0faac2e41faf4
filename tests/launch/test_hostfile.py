"""`lumina launch --hostfile` over several hosts: by every launcher, and with hosts and ranks that go away."""

import json
import re
import shutil
import signal
import sys

import psutil
import pytest
import yaml

from tests.launch.cluster import PATIENCE
from tests.launch.launched import Launched
from tests.parallel.runs import metrics_of, tiny_config, train_on

pytestmark = [pytest.mark.slow, pytest.mark.multinode]
NO_MPI = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
LAUNCHERS = ["ssh", "pdsh", pytest.param("openmpi", marks=NO_MPI)]
ENDLESS = {"train__steps": 100_000, "checkpoint__every": 5}


@pytest.fixture(scope="module")
def one_process(digits, tmp_path_factory):
    """The losses of 20 steps."""
    folder = tmp_path_factory.mktemp("one")
    train_on(1, tiny_config(folder / "run", digits, train__steps=20))
    return [line["loss"] for line in metrics_of(folder / "run")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher(cluster_of, digits, tmp_path, one_process, launcher):
    cluster = cluster_of(["a", "b"], own_name="127.0.1.1")
    launched = Launched(cluster, tmp_path, tiny_config(tmp_path / "run", digits, train__steps=20), launcher)
    assert launched.end() == 0, launched.said
    cluster.wait_until_empty()
    assert "ranks: 4 (data 4)" in launched.said
    assert launched.said.count("step 20/20") == 1
    assert [line["loss"] for line in metrics_of(launched.run_dir)] == pytest.approx(one_process, rel=1e-5)
    logs = sorted(path.name for path in (launched.run_dir / "logs" / "attempt_0").iterdir())
    assert logs == [f"rank_{number:05d}.log" for number in range(4)]


def finish(launched):
    """As Ctrl-C does: it saves and ends, and nothing is left on any host."""
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == 0, launched.said
    launched.cluster.wait_until_empty()


def test_a_host_whose_processes_are_killed(cluster_of, digits, tmp_path):
    """The run goes on without it, and with it when it is back, which is no restart."""
    cluster = cluster_of(["a", "b"])
    tree = tiny_config(tmp_path / "run", digits, **ENDLESS)
    launched = Launched(cluster, tmp_path, tree, "pdsh", options=["--max-restarts", "1"])
    launched.wait_for_step(10)
    gone = [launched.agent("b"), *launched.ranks("b").values()]
    for process in gone:
        process.kill()
    named = launched.wait_for("host b is lost: its agent has ended")
    again = launched.wait_for(" on a (restart 1 of at most 1)")
    assert psutil.wait_procs(gone, timeout=PATIENCE)[1] == []
    back = launched.wait_for("b: there again; the run is saved, and goes on with more hosts")
    launched.wait_for("going on from the checkpoint of step ")
    launched.wait_for_more()
    assert (sorted(launched.ranks("a")), sorted(launched.ranks("b"))) == ([0, 1], [2, 3])
    assert [launched.ranks_of(attempt) for attempt in range(3)] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
    finish(launched)
    steps = [line["step"] for line in metrics_of(launched.run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    print(f"killed: named after {named:.1f} s, restarted {again:.1f} s later, there again {back:.1f} s after that")


def test_a_cable_that_is_pulled(cluster_of, digits, tmp_path):
    """What was on the host ends by itself; it takes part again when the cable is back."""
    cluster = cluster_of(["a", "b"])
    launched = Launched(cluster, tmp_path, tiny_config(tmp_path / "run", digits, **ENDLESS), "ssh")
    launched.wait_for_step(10)
    there = cluster.processes("b")
    cluster.cut("b")
    named = launched.wait_for("host b is lost: not heard of for ")
    assert re.search(r"host b is lost: not heard of for \d\d s: it stopped, or the network to it is cut", launched.said)
    again = launched.wait_for(" on a (restart 1 of at most 100)")
    assert named < 12.5
    assert psutil.wait_procs(there, timeout=PATIENCE)[1] == []
    assert cluster.processes("b") == []
    launched.wait_for_more()
    cluster.mend("b")
    back = launched.wait_for("b: there again; the run is saved, and goes on with more hosts")
    launched.wait_for("going on from the checkpoint of step ")
    launched.wait_for_more()
    assert sorted(launched.ranks("b")) == [2, 3]
    finish(launched)
    print(
        f"cut: named after {named:.1f} s, restarted {again:.1f} s later, there again {back:.1f} s after it was mended"
    )


def test_a_stopped_rank(cluster_of, digits, tmp_path):
    """The watchdog names it, from one host to another."""
    cluster = cluster_of(["a", "b"], own_name="127.0.1.1")
    tree = tiny_config(tmp_path / "run", digits, watchdog__timeout=15.0, **ENDLESS)
    launched = Launched(cluster, tmp_path, tree, "ssh")
    launched.wait_for_step(10)
    rank = launched.ranks("b")[3]
    rank.suspend()
    named = launched.wait_for(f"rank 3 (host b, pid {rank.pid}, pipeline stage 0) has not been heard of for")
    again = launched.wait_for(" on a, b (restart 1 of at most 100)")
    assert not rank.is_running()
    reports = [json.loads(path.read_text()) for path in launched.run_dir.glob("hangs/*/report.json")]
    # By the clock of the one that noticed it; where that one is slow to speak, the deputy on the other host does too.
    assert all(15.0 < report["heartbeats"][3]["heard_seconds_ago"] < 15.0 + 2 for report in reports)
    assert 1 <= len(reports) <= 2
    stacks = {path.name for path in launched.run_dir.glob("hangs/*/rank_*")}
    assert stacks == {f"rank_{rank:05d}.txt" for rank in range(3)}
    launched.wait_for_more()
    finish(launched)
    print(f"stopped rank: named after {named:.1f} s, restarted {again:.1f} s later")


def test_a_stopped_agent_of_a_layout_that_needs_all_hosts(cluster_of, digits, tmp_path):
    """It is ended, with its ranks, and the run waits for the host."""
    cluster = cluster_of(["a", "b"])
    layout = {"parallel__pipeline": 2, "parallel__tensor": 2}
    launched = Launched(cluster, tmp_path, tiny_config(tmp_path / "run", digits, **ENDLESS, **layout), "pdsh")
    connected = launched.wait_for_attempt()
    launched.wait_for_step(10)
    gone = [launched.agent("b"), *launched.ranks("b").values()]
    gone[0].suspend()
    named = launched.wait_for("host b is lost: not heard of for ")
    launched.wait_for("the layout does not fit on the hosts that are left (a): waiting for others to return")
    assert named < 12.5
    again = launched.wait_for(" on a, b (restart 1 of at most 100)")
    # It is tried again after 4 s, and used once it has been there for 5; 15 s in all, where it is connected to as fast
    # as on a machine with nothing else to do.
    assert again < 9.0 + max(6.0, 2 * connected)
    assert psutil.wait_procs(gone, timeout=PATIENCE)[1] == []
    launched.wait_for_more()
    finish(launched)
    print(f"stopped agent: named after {named:.1f} s, restarted {again:.1f} s later")


def test_two_runs_at_once(cluster_of, digits, tmp_path, one_process):
    """On the same hosts, from either of them; one that is killed takes nothing of the other with it."""
    cluster = cluster_of(["a", "b"])
    runs = []
    for number, host in enumerate(("a", "b", "a")):
        folder = tmp_path / str(number)
        folder.mkdir()
        changes = ENDLESS if number == 2 else {"train__steps": 20}
        runs.append(
            Launched(cluster, folder, tiny_config(folder / "run", digits, **changes), "ssh", slots=1, host=host)
        )
    runs[2].wait_for_step(2)
    runs[2].process.kill()
    for run in runs[:2]:
        assert run.end() == 0, run.said
        losses = [line["loss"] for line in metrics_of(run.run_dir)]
        assert losses == pytest.approx(one_process, rel=1e-5)
    cluster.wait_until_empty(15.0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_host_that_cannot_be_reached(cluster_of, digits, tmp_path, launcher):
    """Why is told in ssh's own words, whoever called it, and nothing is left."""
    cluster = cluster_of(["a", "b"])
    (tmp_path / "hosts").write_text("a slots=1\nelsewhere slots=1\nb slots=1 python=/no/python\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "run", digits)))
    command = [sys.executable, "-m", "lumina", "launch", "--hostfile", tmp_path / "hosts", "--launcher", launcher]
    done = cluster.run("a", [*command, tmp_path / "run.yaml"])
    assert done.returncode == 1
    said = done.stderr.removeprefix("lumina launch: ").split("; ")
    assert said[0].startswith("host elsewhere: cannot be reached: ssh: Could not resolve hostname elsewhere: ")
    assert re.match(r"host b: cannot be reached: .*/no/python: ([Nn]o such file|not found)", said[1])
    assert not (tmp_path / "run").exists()
    cluster.wait_until_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_outlives_a_killed_supervisor(cluster_of, digits, tmp_path, launcher):
    cluster = cluster_of(["a", "b"])
    launched = Launched(cluster, tmp_path, tiny_config(tmp_path / "run", digits, **ENDLESS), launcher, slots=1)
    launched.wait_for_step(2)
    launched.process.kill()
    cluster.wait_until_empty(10.0)
