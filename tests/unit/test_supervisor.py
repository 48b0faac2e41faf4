"""Restarts, signals and what is left behind, with ranks that are small programs in place of trainers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lumina.cli import main
from lumina.config.exits import BAD_INPUT, CRASH_LOOP, FAILED, HANG
from lumina.launch.console import Console, Said
from lumina.launch.crew import Tail, furthest_step, newest_checkpoint
from lumina.launch.messages import Ended
from lumina.launch.supervisor import _GRACE_SECONDS, _SETTLE_SECONDS

PATIENCE = 600.0
"""Seconds after which something hangs."""
SUPERVISE = (
    "import sys; from pathlib import Path; from lumina.launch import supervisor; "
    "from lumina.launch.hosts import LocalHost; "
    "settle, grace, world, run_dir, restarts, *arguments = sys.argv[1:]; "
    "supervisor._SETTLE_SECONDS, supervisor._GRACE_SECONDS = float(settle), float(grace); "
    "sys.exit(supervisor.Supervisor(LocalHost(int(world)), arguments, Path(run_dir), int(restarts)).run())"
)
# A rank: it says where it is, does what the test wants, and lasts until it is told to end.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
attempt = len(list((run / "logs").iterdir())) - 1
(run / f"here_{attempt}_{rank}").write_text(json.dumps([os.getpid(), os.environ["MASTER_PORT"]]))
def reached(step):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
def say(text):
    print(text, file=sys.stderr, flush=True)
def last():
    time.sleep(1200)
"""


class Supervised:
    """A supervisor in a process of its own.

    settle, grace: seconds for the other ranks, from the failure of one on and when they are told to end. Where a test
    is about what they do meanwhile they are so many that a busy machine has time for it; as they are, where they pass.
    """

    def __init__(self, folder: Path, body: str, world=2, restarts=100, settle=_SETTLE_SECONDS, grace=_GRACE_SECONDS):
        self.run_dir = folder / "run"
        script = folder / "rank.py"
        script.write_text(RANK + body)
        words = map(str, (settle, grace, world, self.run_dir, restarts, "-S", script, self.run_dir))
        self.process = subprocess.Popen([sys.executable, "-c", SUPERVISE, *words], stderr=subprocess.PIPE, text=True)
        _started.append(self.process)

    def end(self) -> tuple[int, str]:
        """Exit code and what was said; nothing is left."""
        _, said = self.process.communicate(timeout=PATIENCE)
        left = [p for p in psutil.process_iter(["cmdline"]) if str(self.run_dir) in (p.info["cmdline"] or [])]
        assert left == []
        return self.process.returncode, said

    def here(self, attempt: int, rank: int) -> tuple[int, str]:
        """Process and port of a rank, once it is there."""
        path = self.run_dir / f"here_{attempt}_{rank}"
        deadline = time.monotonic() + PATIENCE
        while not path.exists() or not path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return tuple(json.loads(path.read_text()))


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Of a test that fails either: ranks end with their supervisor."""
    yield
    for process in _started:
        process.kill()
        process.wait()
        process.stderr.close()
    _started.clear()


def gone(pid: int) -> bool:
    """Whether it ends."""
    deadline = time.monotonic() + PATIENCE
    while _lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_know_each_other_and_write_into_files(tmp_path):
    wanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    body = f"say(' '.join(os.environ[name] for name in {wanted}))\nsay('lumina launched')"
    run = Supervised(tmp_path, body)
    code, said = run.end()
    assert code == 0
    assert said == "0 0 2 2 127.0.0.1\nlumina launched\n"
    logs = run.run_dir / "logs" / "attempt_0"
    assert (logs / "rank_00001.log").read_text() == "1 1 2 2 127.0.0.1\nlumina launched\n"
    assert run.here(0, 0)[1] == run.here(0, 1)[1]


def test_a_killed_rank_is_named_and_all_start_again(tmp_path):
    """Not the rank that notices it, and says so if it is let; that one has a moment to write down what it sees."""
    body = (
        "reached(attempt + 1)\n"
        "if attempt: sys.exit(0)\n"
        "if rank: last()\n"
        "def note(*_):\n"
        "    time.sleep(0.3); (run / 'noted').touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, note)\n"
        "other = run / 'here_0_1'\n"
        "while not other.exists() or not other.read_text(): time.sleep(0.01)\n"
        "stat = Path(f'/proc/{json.loads(other.read_text())[0]}/stat')\n"
        "while ') Z' not in stat.read_text(): time.sleep(0.01)\n"
        "time.sleep(30); say('lumina train: a rank is gone'); last()"
    )
    run = Supervised(tmp_path, body, settle=60.0, grace=PATIENCE)
    (first, _), (second, _) = run.here(0, 0), run.here(0, 1)
    os.kill(second, signal.SIGKILL)
    code, said = run.end()
    assert code == 0
    told = [line for line in said.splitlines() if line.startswith("lumina launch: ")]
    host = os.uname().nodename
    assert told[0] == f"lumina launch: rank 1 on {host} (pid {second}) was ended by SIGKILL"
    assert told[1] == "lumina launch: starting again from the beginning (restart 1 of at most 100)"
    assert "a rank is gone" not in said
    assert (run.run_dir / "noted").exists()
    assert gone(first)
    assert run.here(1, 0)[0] not in (first, second)
    assert sorted(path.name for path in (run.run_dir / "logs").iterdir()) == ["attempt_0", "attempt_1"]


def test_a_stopped_rank_does_not_keep_the_others(tmp_path):
    """SIGTERM would wait for ever in a process that SIGSTOP holds."""
    run = Supervised(tmp_path, "if attempt: sys.exit(0)\nlast()", restarts=1)
    (first, _), (second, _) = run.here(0, 0), run.here(0, 1)
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    assert run.end()[0] == 0
    assert gone(first)


def test_the_first_error_is_told_once(tmp_path):
    """Rank 1 fails, rank 0 by its leave and sooner; rank 2 says so as well."""
    body = (
        "if rank == 0: say('lumina train: [gloo] Connection closed by peer'); sys.exit(1)\n"
        "time.sleep(0.3)\n"
        "say(f'lumina train: rank {rank}: the data are gone' if rank == 1 else 'lumina train: rank 2: Broken pipe')\n"
        "sys.exit(1)"
    )
    code, said = Supervised(tmp_path, body, world=3, restarts=0, settle=PATIENCE).end()
    assert code == FAILED
    host = os.uname().nodename
    assert said.splitlines()[0] == f"lumina launch: rank 1 on {host}: the data are gone"
    assert said.count("gone") == 1
    assert "gloo" not in said
    assert "Broken" not in said


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("[gloo] Connection closed by peer", -9, "(pid 7) was ended by SIGKILL"),
        ("the disk is full", -6, "rank 0 on here: the disk is full"),  # and it died in its leave
        ("[gloo] Connection closed by peer", 1, "rank 0 on here: [gloo] Connection closed by peer"),
    ],
)
def test_what_others_follow_from(capsys, error, code, told):
    """An error that was written, and then a rank that ended."""
    console = Console()
    console.errors.append(Said("here", 0, error))
    console.tell_cause([("here", Ended(rank=1, pid=7, code=code, last=""))])
    assert told in capsys.readouterr().err


def test_an_end_without_a_word(tmp_path):
    code, said = Supervised(tmp_path, "say('Segmentation');sys.exit(7) if rank else last()", restarts=0).end()
    assert code == FAILED
    assert 'ended with exit code 7; its last words: "Segmentation"' in said


def test_bad_input_is_not_tried_again_and_leaves_nothing(tmp_path):
    body = "os.remove(run / f'here_{attempt}_{rank}')\nsay('lumina train: parallel.tensor=3 is wrong'); sys.exit(2)"
    run = Supervised(tmp_path, body, settle=PATIENCE)
    code, said = run.end()
    assert code == BAD_INPUT
    assert said.count("parallel.tensor=3 is wrong") == 1
    assert "again" not in said
    assert not run.run_dir.exists()


@pytest.mark.parametrize(("gained", "attempts"), [(0, 3), (5, 4)])
def test_a_crash_loop_ends(tmp_path, gained, attempts):
    """Three attempts without a step more; the first came as far as the ones after it."""
    code, said = Supervised(tmp_path, f"if {gained}: reached({gained})\nsys.exit(1)").end()
    assert code == CRASH_LOOP
    assert said.count("starting again") == attempts - 1
    assert f"3 attempts in a row came no further than step {gained}: not tried again" in said


def test_progress_renews_the_tries_and_the_budget_ends_them(tmp_path):
    code, said = Supervised(tmp_path, "reached(10 + attempt // 2)\nsys.exit(75)", restarts=6).end()
    assert code == HANG
    assert said.count("starting again") == 6
    assert "--max-restarts 6 are used up" in said


def test_sigterm_is_passed_on_and_waited_for(tmp_path):
    """A rank saves for longer than the grace that a failed one has."""
    body = (
        "def stop(*_):\n"
        "    time.sleep(3.5); (run / f'saved_{rank}').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(run / f'ready_{rank}').touch(); last()"
    )
    run = Supervised(tmp_path, body)
    while len(list(run.run_dir.glob("ready_*"))) < 2:
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code == 0
    assert len(list(run.run_dir.glob("saved_*"))) == 2
    assert "again" not in said


def test_ctrl_c_before_training_has_begun(tmp_path):
    run = Supervised(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank else None\nlast()")
    run.here(0, 0), run.here(0, 1)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert (code, said.count("stopped before training had begun")) == (0, 1)


def test_nothing_outlives_a_killed_supervisor(tmp_path):
    run = Supervised(tmp_path, "last()")
    pids = [run.here(0, rank)[0] for rank in range(2)]
    run.process.kill()
    assert all(gone(pid) for pid in pids)


def test_what_ranks_leave_behind_is_ended(tmp_path):
    """A process of their group, and one in a session of its own."""
    body = (
        "children = [subprocess.Popen(['sleep', '600'], start_new_session=new) for new in (False, True)]\n"
        "(run / f'begun_{rank}').write_text(json.dumps([child.pid for child in children]))\n"
        "(run / f'begun_{rank}').rename(run / f'children_{rank}')\n"
        "if rank: last()\n"
        "while not (run / 'children_1').exists(): time.sleep(0.01)\n"
        "os._exit(1)"
    )
    run = Supervised(tmp_path, body, restarts=0)
    assert run.end()[0] == FAILED
    pids = [pid for rank in range(2) for pid in json.loads((run.run_dir / f"children_{rank}").read_text())]
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)


def test_two_at_once_have_ports_of_their_own(tmp_path):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        runs.append(Supervised(tmp_path / name, "last()"))
    ports = [run.here(0, 0)[1] for run in runs]
    assert len(set(ports)) == 2
    # Rank 0 may listen on the port that is held for it, and nobody else is given it.
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", int(ports[0]), is_master=True, wait_for_workers=False)
    store.set("key", "value")
    for run in runs:
        run.process.send_signal(signal.SIGTERM)
        assert run.end()[0] == 0


def test_how_far_a_run_has_come(tmp_path):
    assert (furthest_step(tmp_path), newest_checkpoint(tmp_path)) == (0, 0)
    for name in ("step_00000007", ".step_00000090.partial", "latest", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert (furthest_step(tmp_path), newest_checkpoint(tmp_path)) == (7, 7)
    lines = [json.dumps({"step": step, "filler": "x" * 200}) for step in range(1, 1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1000, "lo')
    assert furthest_step(tmp_path) == 999


def test_a_line_is_shown_when_it_is_whole(tmp_path):
    path = tmp_path / "log"
    path.write_bytes("loss \u00b7 1".encode()[:6])
    tail = Tail(path)
    assert tail.lines() == []
    with path.open("ab") as file:
        file.write("loss \u00b7 1".encode()[6:] + b"\r\nnext\n\nbegun")
    assert tail.lines() == ["loss · 1", "next", ""]
    assert (tail.last, tail.lines()) == ("next", [])
    with path.open("a") as file:  # which torch says where hosts have no names
        file.write(
            "\n[W1123 15:00:00.1 socket.cpp:1] [c10d] The hostname of the client socket cannot be retrieved. err=-3\n"
        )
    assert (tail.lines(), tail.last) == (["begun"], "begun")
    path.unlink()
    assert tail.lines() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ranks", "0"], "--ranks must be at least 1, not 0"),
        (["--ranks", "2", "--max-restarts", "-1"], "--max-restarts must be at least 0, not -1"),
        ([], "--ranks N or --hostfile FILE is missing"),
        (["--ranks", "2", "--hostfile", "hosts"], "with --hostfile the slots of each host are its ranks"),
        (["--hostfile", "no/such"], "the hostfile no/such cannot be read: No such file or directory"),
        (["--ranks", "2", "--nodes", "1"], "--nodes chooses from a hostfile"),
        (["--ranks", "2", "--launcher", "ssh"], "--launcher ssh reaches the hosts of a hostfile"),
        (["--ranks", "2", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: it is not set here"),
        (["--ranks", "2", "CONFIG", "train.stepz=3"], "unknown key train.stepz; did you mean train.steps?"),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, sentence):
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{dir: {tmp_path}/run}}\nmodel: {{}}\ndata: {{shards: [x]}}\ntrain: {{steps: 2}}\n")
    words = words if "CONFIG" in words else [*words, "CONFIG"]
    assert main(["launch", *(str(config) if word == "CONFIG" else word for word in words)]) == BAD_INPUT
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
