"""`lumina doctor --hostfile` on hosts with something wrong with each, and on hosts with nothing wrong."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import lumina
import lumina.kernels
import lumina.megatron_patches
from tests.launch.cluster import PATIENCE
from tests.parallel.runs import tiny_config

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

DOCTOR = [sys.executable, "-m", "lumina", "doctor"]
# In place of torch.version, as another release has it; and a clock that is ahead.
STUB = """
import importlib.abc, importlib.machinery, sys, time

class Other(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch.version":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.__version__ = "2.10.1+other"
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Other())
now = time.time
time.time = lambda: now() + 30
"""


def python_with(folder: Path, path: Path) -> Path:
    """A Python that looks for modules in `path` first."""
    wrapper = folder / "python"
    folder.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def other_torch(folder: Path) -> Path:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STUB)
    return python_with(folder, folder)


def other_code(folder: Path) -> Path:
    """The same, but for a line in one kernel's file."""
    for module in (lumina, lumina.kernels, lumina.megatron_patches):
        place = folder / module.__name__.replace(".", "/")
        shutil.copytree(module.__path__[0], place, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "lumina/kernels/dispatch.py").open("a") as file:
        file.write("# another commit\n")
    return python_with(folder / "bin", folder)


@pytest.fixture
def run(tmp_path, digits, monkeypatch):
    """A configuration in a folder of its own, in which the doctor and all hosts work."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "data")
    Path("runs/tiny").mkdir(parents=True)
    Path("run.yaml").write_text(yaml.safe_dump(tiny_config(Path("runs/tiny"), Path("data"))))
    return tmp_path


def found_in(report: dict, name: str) -> dict[str, dict]:
    """Lines of a check that are not ok, by host."""
    return {check["host"]: check for check in report["checks"] if check["name"] == name and check["state"] != "ok"}


def test_each_fault_is_found_by_name(run, cluster_of):
    before = set(Path("/tmp").glob("lumina-doctor-*"))
    hosts = cluster_of(["a", "b", "c", "d", "e"])
    pythons = {"b": other_torch(run / "other_torch"), "c": other_code(run / "other_code")}
    hostfile = run / "hosts.txt"
    hostfile.write_text(
        "".join(f"{n} slots=1" + (f" python={pythons[n]}" if n in pythons else "") + "\n" for n in "abcde")
    )

    def inside(name: str, command: str) -> None:
        done = hosts.run(name, ["sh", "-ec", command])
        assert done.returncode == 0, done.stderr

    listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(600)"
    hosts.start("a", [sys.executable, "-c", listen])
    inside("c", "mount -t tmpfs -o size=1m none runs/tiny; head -c 900K /dev/zero > runs/tiny/config.yaml")
    shutil.copytree("data", "short")
    (run / "short/digits-000002.tar").unlink()
    inside("d", "mount -t tmpfs -o ro none runs/tiny; mount --bind short data")
    # netem is not in every kernel
    inside("d", "tc qdisc add dev eth0 root tbf rate 5mbit burst 32kb latency 400ms")
    hosts.cut("e")

    options = ["--hostfile", hostfile, "--launcher", "ssh", "--port", "29500", "--json"]
    done = hosts.run("a", [*DOCTOR, *options, "run.yaml", "parallel.tensor=2"])
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["state"] == "FAIL"
    assert all(check["mend"] for check in report["checks"] if check["state"] != "ok")

    # host → what is said of it; and nothing of any other host
    said = {
        "hosts": {"e": "cannot be reached: ssh: connect to host e port 22: No route to host"},
        "same torch": {"b": "2.10.1+other, and "},
        "clocks": {"b": " s ahead of this host"},
        "same code": {"c": ", and "},
        "port": {"a": "29500 cannot be used: Address already in use"},
        "disk": {"c": "free at runs/tiny; a checkpoint takes "},
        "run folder": {"d": "runs/tiny cannot be written: Read-only file system"},
        "shared folder": {"c": "is not seen", "d": "is not seen"},
        "shards": {"d": "data/digits-000002.tar is missing"},
        "layout": dict.fromkeys("abcd", "a world of 5 processes cannot be laid out as parallel.tensor=2"),
        "links": {"": "slowest pair d → "},
    }
    wrong = {check["name"] for check in report["checks"] if check["state"] != "ok"}
    assert wrong == set(said)
    for name, where in said.items():
        lines = found_in(report, name)
        assert {host: where[host] in line["finding"] for host, line in lines.items()} == dict.fromkeys(where, True), (
            lines
        )
    (links,) = found_in(report, "links").values()
    assert links["state"] == "FAIL"
    slow = links["finding"].partition(" usual: ")[2].split(", ")
    # Where the machine has other things to do, one of the others may look slow too; those of d are far slower.
    assert {words.split()[0] + words.split()[2] for words in slow[:3]} == {"da", "db", "dc"}
    assert all(float(words.split()[3]) < 2 and words.split()[4][:4] == "MB/s" for words in slow[:3]), (
        slow
    )  # of 5 Mbit/s
    assert "; d has part in " in links["finding"]
    assert found_in(report, "port")["a"]["state"] == found_in(report, "same code")["c"]["state"] == "FAIL"

    assert not list(run.rglob(".lumina-doctor-*"))
    # Those of another run of these tests, at the same time, go as well.
    deadline = time.monotonic() + PATIENCE
    while set(Path("/tmp").glob("lumina-doctor-*")) - before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    hosts.wait_until_empty(but=listen)


def test_hosts_with_nothing_wrong_pass(run, cluster_of):
    hosts = cluster_of(["a", "b"])
    done = hosts.run("a", [*DOCTOR, "--hostfile", hosts.hostfile(1), "--no-bandwidth", "run.yaml"])
    assert done.returncode == 0, done.stdout + done.stderr
    words = {line.split()[1]: " ".join(line.split()) for line in done.stdout.splitlines() if line.startswith("ok ")}
    assert words["hosts"] == "ok hosts 2 of 2 answer"
    assert words["layout"] == "ok layout all fits 2 ranks, 2 of them data-parallel"
    assert words["checkpoint"] == "ok checkpoint all none in runs/tiny: the run starts from the beginning"
    assert words["port"].startswith("ok port a 29500")
    assert "failed: 0, " in done.stdout
    hosts.wait_until_empty()
    assert subprocess.run(["ls", "-A", "runs/tiny"], capture_output=True, text=True).stdout == ""
