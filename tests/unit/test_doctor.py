"""`lumina doctor` on one host: what is wrong is found by name, with its mend; and what it makes of many hosts."""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml

from lumina.cli import main
from lumina.config.load import load_config, validate
from lumina.doctor import devices, fleet, on_host, surroundings
from lumina.doctor import run as run_checks
from lumina.doctor.check import FAIL, OK, WARNING, Check, as_table, folded, worst
from lumina.doctor.fleet import Answer
from lumina.launch.hostfile import Host
from lumina.train.loop import train
from tests.parallel.runs import tiny_config
from tests.parallel.workers import free_port

GB = 10**9


@pytest.fixture
def run(tmp_path, digits, monkeypatch):
    """A configuration of a run of the digits, all in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "data")
    tree = tiny_config("runs/tiny", "data", train__steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def doctor(capsys, *arguments):
    """Exit code, and the checks that are not ok, by name."""
    capsys.readouterr()
    code = main(["doctor", "--json", *map(str, arguments)])
    report = json.loads(capsys.readouterr().out)
    wrong = {check["name"]: check for check in report["checks"] if check["state"] != OK}
    assert all(check["mend"] for check in wrong.values())
    assert report["state"] == worst([Check(**check) for check in report["checks"]])
    return code, wrong


def listening():
    """At a port that nobody else is given once it listens no more."""
    port = free_port()
    return socket.create_server(("", port)), port


def test_a_run_with_nothing_wrong(run, capsys):
    code, wrong = doctor(capsys, "run.yaml", "--ranks", "1", "--port", free_port())
    assert (code, wrong) == (0, {})
    assert sorted(os.listdir()) == ["data", "run.yaml"]  # nothing is left behind


def test_many_faults_at_once_are_each_found(run, capsys, monkeypatch):
    (run / "data/digits-000001.tar").unlink()
    (run / "runs").write_text("a file where a folder is to be")
    full = SimpleNamespace(free=50_000)
    monkeypatch.setattr(surroundings.psutil, "disk_usage", lambda path: full)
    listener, port = listening()
    with listener:
        code, wrong = doctor(capsys, "run.yaml", "--ranks", "3", "--port", port, "parallel.tensor=2")
    assert code == 1
    wrong.pop("devices", None)  # three ranks are more than some machines have cores
    assert {name: check["state"] for name, check in wrong.items()} == {
        "run folder": FAIL,
        "disk": FAIL,
        "shared memory": WARNING,
        "port": FAIL,
        "layout": FAIL,
        "shards": FAIL,
    }
    assert "runs/tiny cannot be written: Not a directory" in wrong["run folder"]["finding"]
    assert "another run.dir" in wrong["run folder"]["mend"]
    assert "0.1 MB free at runs/tiny; a checkpoint takes 0.3 MB" in wrong["disk"]["finding"]
    assert f"{port} cannot be used: Address already in use; " in wrong["port"]["finding"]
    assert f"(pid {os.getpid()}) listens there" in wrong["port"]["finding"]
    assert "a world of 3 processes cannot be laid out as parallel.tensor=2" in wrong["layout"]["finding"]
    assert "data/digits-000001.tar is missing" in wrong["shards"]["finding"]
    assert "lumina data check" in wrong["shards"]["mend"]


def test_the_table_has_the_mend_below_the_finding(run, capsys):
    listener, port = listening()
    with listener:
        assert main(["doctor", "--port", str(port)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("FAIL     port ")]
    assert f"{port} cannot be used" in lines[at]
    assert lines[at + 1].lstrip().startswith(("mend", f"(pid {os.getpid()})"))
    assert any(line.startswith("failed: 1, warnings: 0, ok: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.yaml"], "nothing.yaml: no such configuration file"),
        (["--port", "70000"], "--port 70000: ports are from 1 to 65535"),
        (["--ranks", "0"], "--ranks must be at least 1, not 0"),
        (["--nodes", "2"], "--nodes chooses from a hostfile: give --hostfile too"),
        (["--hostfile", "nowhere"], "the hostfile nowhere cannot be read: No such file or directory"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err == f"lumina doctor: {said}\n"


def test_a_port_that_nobody_asked_for_only_warns():
    listener, port = listening()
    with listener:
        assert surroundings.check_port(port, asked=False).state == WARNING
    assert surroundings.check_port(port, asked=True).state == OK  # it was let go of, a moment ago


def test_a_configuration_that_does_not_load_is_a_check(run, capsys):
    code, wrong = doctor(capsys, "run.yaml", "--port", free_port(), "train.stepz=3")
    assert code == 1
    assert wrong.keys() == {"configuration"}
    assert "train.stepz" in wrong["configuration"]["finding"]
    assert "train.steps" in wrong["configuration"]["finding"]


def test_a_folder_that_is_in_use_or_something_else(run):
    folder = run / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / ".lumina-doctor-of-another-host").touch()
    (found,) = surroundings.check_folder(folder)
    assert found.state == OK
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (found,) = surroundings.check_folder(folder)
        assert (found.state, "another process trains there" in found.finding) == (WARNING, True)
    (folder / "thesis.tex").touch()
    (found,) = surroundings.check_folder(folder)
    assert (found.state, "holds no run of Lumina" in found.finding) == (FAIL, True)


@pytest.mark.parametrize(
    ("free", "state"), [(1 * GB - 1, FAIL), (1 * GB, WARNING), (3 * GB - 1, WARNING), (3 * GB, OK)]
)
def test_disk(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(surroundings.psutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert surroundings.check_disk(tmp_path, needed=1 * GB, kept=3 * GB).state == state


@pytest.mark.parametrize(
    ("free", "gpus", "state"), [(6e7, 8, FAIL), (6e7, 0, WARNING), (5e8, 8, WARNING), (6e8, 8, OK)]
)
def test_shared_memory(monkeypatch, free, gpus, state):
    monkeypatch.setattr(surroundings.psutil, "disk_usage", lambda path: SimpleNamespace(free=int(free)))
    found = surroundings.check_shared_memory(gpus)
    assert found.state == state
    assert state == OK or "--shm-size" in found.mend


def shards_of(config):
    (found,) = run_checks.check_shards(config, run_checks.model_config(config))
    return found


def test_shards_that_are_not_what_their_index_says(run):
    config = load_config("run.yaml")
    assert shards_of(config) == Check("shards", OK, "4 there, as their indexes say: 1,797 samples")

    shard, index = run / "data/digits-000002.tar", run / "data/digits-000002.index.safetensors"
    whole, dates = shard.read_bytes(), index.stat()
    shard.write_bytes(whole[:-512])
    os.utime(shard, ns=(dates.st_atime_ns, dates.st_mtime_ns))  # as a copy that was cut short keeps its date
    found = shards_of(config)
    assert (found.state, found.finding) == (
        FAIL,
        f"shard {shard} has {len(whole) - 512:,} bytes, and its index says {len(whole):,}",
    )
    shard.write_bytes(whole)
    index.unlink()
    found = shards_of(config)
    assert (found.state, found.finding) == (WARNING, f"4 there; without an index that matches: {shard}")
    assert "lumina data index" in found.mend


def test_data_that_the_model_is_not_made_for(run):
    tree = tiny_config("runs/tiny", "data", train__tokens_per_pack=10)
    found = shards_of(validate(tree, "test"))
    assert (found.state, "do not fit in train.tokens_per_pack=10" in found.finding) == (FAIL, True)
    found = shards_of(load_config("run.yaml", ["data.shards=[elsewhere]"]))
    assert (found.state, "elsewhere is missing" in found.finding) == (FAIL, True)


def test_a_checkpoint_that_does_not_fit(run, capsys):
    train(load_config("run.yaml"))
    found = run_checks.check_checkpoint
    config = load_config("run.yaml")
    sizes = run_checks.model_config(config)
    said = found(config, sizes)
    assert said.state == OK
    assert said.finding.startswith("runs/tiny/checkpoints/step_00000001, step 1 of 1: ")

    other = load_config("run.yaml", ["model.n_layers=3"])
    said = found(other, run_checks.model_config(other))
    assert (said.state, "model.n_layers=3, but runs/tiny was trained with 2" in said.finding) == (FAIL, True)

    start = ["run.dir=runs/new", "train.init_from=runs/tiny"]
    new = load_config("run.yaml", start)
    assert found(new, sizes).finding == "none in runs/new: the run starts from runs/tiny"
    wide = load_config("run.yaml", [*start, "model.dim=32", "model.multiple_of=32"])
    said = found(wide, run_checks.model_config(wide))
    assert (said.state, "train.init_from=runs/tiny does not fit the model" in said.finding) == (FAIL, True)

    (file,) = (run / "runs/tiny/checkpoints/step_00000001").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    said = found(config, sizes)
    assert (said.state, f"{file.name} has " in said.finding) == (WARNING, True)


def test_memory_that_is_not_there(run, monkeypatch):
    def memory(config, total, available):
        monkeypatch.setattr(
            run_checks.psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=available)
        )
        run = run_checks.open_run("run.yaml", config)
        (found,) = [check for check in run_checks.check_run(run, 2, (0, 1)) if check.name == "host memory"]
        return found

    assert memory([], 10**9, 10**9).state == OK
    assert memory([], 10**9, 10**5).state == WARNING
    assert memory([], 10**5, 10**5).state == FAIL
    assert "2 ranks take " in memory([], 10**9, 10**9).finding


# What is made of many hosts.


def answers(**facts):
    return {name: Answer(found={"facts": of_host}) for name, of_host in facts.items()}


def test_the_odd_one_out_is_named_against_the_most():
    usual = {"code": "1" * 64, "torch": "2.12", "Python": "3.12.3", "driver": "580.1", "CUDA": None}
    found = {
        (check.name, check.host): check
        for check in fleet.check_same(
            answers(a=usual | {"torch": "2.11"}, b=usual | {"driver": "570.9"}, c=usual, d=usual | {"Python": "3.12.4"})
        )
    }
    assert {key: check.state for key, check in found.items()} == {
        ("same torch", "a"): FAIL,
        ("same driver", "b"): WARNING,
        ("same Python", "d"): WARNING,  # another patch release
        ("same on all", ""): OK,
    }
    assert found["same torch", "a"].finding == "2.11, and 2.12 on b, c, d"
    assert found["same torch", "a"].mend == "install torch 2.12 there"
    assert found["same on all", ""].finding == "code 111111111111, CUDA none"
    (odd,) = fleet.check_same(answers(a={"Python": "3.12.3"}, b={"Python": "3.11.3"}))
    assert (odd.host, odd.state) == ("b", FAIL)
    assert list(fleet.check_same(answers(a=usual))) == []


@pytest.mark.parametrize(
    ("why", "mend"),
    [
        ("root@b: Permission denied (publickey).", "ssh-copy-id b"),
        ("ssh: Could not resolve hostname b: Name or service not known", "correct the name in the hostfile"),
        ("ssh: connect to host b port 22: Connection refused", "start sshd on b"),
        ("ssh: connect to host b port 22: No route to host", "ping b"),
        ("Host key verification failed.", "accept its key"),
        ("/opt/python: No module named lumina", "install this version of Lumina"),
        ("sh: 1: exec: /opt/python: not found", "python= and dir="),
        ("something else", "--exclude b"),
    ],
)
def test_a_host_that_is_not_reached(why, mend):
    what = "does not start Lumina" if "/opt/python" in why else "cannot be reached"
    gone, there = fleet.check_reached({"a": Answer(found={}), "b": Answer(why=why)})
    assert (gone.state, gone.host, gone.finding) == (FAIL, "b", f"{what}: {why}")
    assert mend in gone.mend
    assert there.finding == "1 of 2 answer"


def test_a_host_that_hangs_is_given_up(tmp_path, monkeypatch):
    """The time is over once it has said something: on a busy machine half a second may be too short for that."""

    class Timer(threading.Timer):
        def run(self):
            while not (tmp_path / "said").exists() and not self.finished.is_set():
                time.sleep(0.01)
            super().run()

    monkeypatch.setattr(fleet.threading, "Timer", Timer)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho Welcome to this host >&2\nsleep 1200 &\ntouch {tmp_path}/said\nwait\n")
    script.chmod(0o755)
    host = Host("localhost", (0,), python=str(script), directory=str(tmp_path))
    (answer,) = fleet.ask([host], "ssh", {"localhost": "{}"}, limit=0.5).values()
    assert answer.found is None
    assert answer.why == 'no answer in 0 s; it said: "Welcome to this host"'
    deadline = time.monotonic() + 600
    while sleeping():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sleeping():
    """Whether a `sleep` that this process is the ancestor of has not ended."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found.append(process.name() == "sleep" and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            continue
    return any(found)


def test_clocks():
    (found,) = fleet.check_clocks({"a": Answer(ahead=-0.2), "b": Answer(ahead=-7.0), "c": Answer()})
    assert (found.state, found.host, found.finding) == (WARNING, "b", "7.0 s behind this host")
    (found,) = fleet.check_clocks({"a": Answer(ahead=-0.2), "b": Answer(ahead=1.9)})
    assert (found.state, found.finding) == (OK, "within 1.9 s of this host's")


def test_of_a_clocks_lines_the_fastest_counts():
    answer = Answer()
    for told, arrived in ((100.0, 103.0), (110.0, 110.5), (120.0, 121.0)):
        fleet._note(answer, on_host.CLOCK, told, arrived)
    assert answer.ahead == -0.5


def test_answers_are_found_among_what_else_a_host_prints():
    line = json.dumps({"lumina doctor": "found", "content": {"x": 1}})
    assert on_host.read(line) == on_host.read(f"b: {line}\n") == ("found", {"x": 1})  # as pdsh would prefix it
    assert on_host.read("Welcome to node b") is on_host.read('{"lumina doctor": "fou') is None


def test_a_request_comes_through_as_it_was():
    request = on_host.Request((0, 2), 8, 29500, True, "a b.yaml", ('data.shards=["x y"]',), "runs/.t")
    assert on_host.Request.decode(request.encode()) == request


def test_what_is_true_of_all_hosts_is_said_once():
    checks = [Check("disk", OK, "much", host=name) for name in "abc"]
    checks += [Check("port", FAIL, "taken", "end it", "a"), Check("disk", FAIL, "full", "free it", "d")]
    found = folded(checks, list("abcd"))
    assert [(check.name, check.state, check.host) for check in found] == [
        ("disk", FAIL, "d"),
        ("disk", OK, "a, b, c"),
        ("port", FAIL, "a"),
    ]
    assert folded(checks[:3], list("abc"))[0].host == "all"
    lines = as_table(found).splitlines()
    assert lines[0].split() == ["FAIL", "disk", "d", "full"]
    assert lines[1].split() == ["mend", "free", "it"]
    assert lines[-1] == "failed: 2, warnings: 0, ok: 1"


def test_nvidia_smi_and_the_kernel_log_are_read(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n*driver*) echo 580.65.06; echo 580.65.06;;\n'
        '*index,ecc*) echo "0, 0"; echo "1, 3";;\n*) echo "not a valid field" >&2; exit 2;;\nesac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices.driver_version() == "580.65.06"
    assert devices.nvidia_smi(["remapped_rows.failure"]) == []
    monkeypatch.setattr(devices, "_computes_wrongly", lambda number: "")
    monkeypatch.setattr(
        devices, "_kernel_log", lambda: "[1.2] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n" * 2
    )
    found = devices._health([0, 1])
    assert found.state == FAIL
    assert found.finding == (
        "GPU 1: memory errors that ECC could not correct (3); the kernel log has Xid 79 of 0000:3b:00"
    )
    assert devices._health([0]).state == WARNING
