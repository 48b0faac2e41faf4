"""What the shell of another host makes of our commands, and the nodes of a Slurm job; the network is a script."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.launch import transport
from lumina.launch.hostfile import Host
from lumina.launch.transport import choose_launcher, command_on, environment_of, is_here, slurm_hosts

TELL = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))"
ARGUMENTS = ["-c", TELL, "a b", "it's", '"q"', "%h %u %n %%", "$HOME `id` \\ ; & | > *", "", "key=['x', y]"]
# As sshd does it: the words behind the name of the host in one line, for the login shell there.
SSH = """#!/bin/sh
while [ "$1" != far ]; do shift; done
shift
cd / && HOME={home} exec sh -c "$*"
"""
# srun starts the program without a shell, in this folder and with this environment.
SRUN = """#!/bin/sh
echo "$*" >> {calls}
while [ "${{1#--}}" != "$1" ]; do shift; done
cd / && HOME={home} exec "$@"
"""


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Home folders here and there, and programs in place of the network; the name `far` is no host."""
    here, there = tmp_path / "my home %h", tmp_path / "their $HOME's"
    (tmp_path / "bin").mkdir()
    for home in (here, there):
        (home / "wo rk").mkdir(parents=True)
        (home / "ven v").symlink_to(Path(sys.executable).parent)
    for name, text in (("ssh", SSH), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(home=shlex.quote(str(there)), calls=shlex.quote(str(tmp_path / "calls"))))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr(sys, "executable", str(here / "ven v" / Path(sys.executable).name))
    monkeypatch.chdir(here / "wo rk")
    monkeypatch.setattr(transport, "is_here", lambda name: name == "here")
    return here, there


def told(command, launcher):
    """Where it ran, and the arguments that arrived."""
    done = subprocess.run(command, env=environment_of(launcher), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder, arguments = json.loads(done.stdout)
    return Path(folder), arguments


def launchers():
    return [
        pytest.param(name, marks=pytest.mark.skipif(name == "pdsh" and not shutil.which("pdsh"), reason="no pdsh here"))
        for name in ("ssh", "pdsh", "openmpi", "slurm")
    ]


@pytest.mark.parametrize("launcher", launchers())
def test_arguments_arrive_as_they_are(far, launcher):
    """In the folder of the same name below the home folder there, from the Python below it."""
    command = command_on(Host("far", (0,)), launcher, ARGUMENTS)
    if launcher == "openmpi":  # mpirun hands the words on as they are
        command = ["env", f"HOME={far[1]}", *command[command.index("sh") :]]
    assert told(command, launcher) == (far[1] / "wo rk", ARGUMENTS[2:])


@pytest.mark.parametrize("launcher", launchers())
@pytest.mark.parametrize("below_home", [True, False])
def test_python_and_folder_of_a_hostfile(far, tmp_path, launcher, below_home):
    (far[1] / "lib" / "py").mkdir(parents=True)
    (far[1] / "lib" / "bin").symlink_to(Path(sys.executable).resolve().parent)
    begin = "~" if below_home else str(far[1])
    python = f"{begin}/lib/bin/{Path(sys.executable).resolve().name}"
    host = Host("far", (0,), python=python, directory=f"{begin}/lib/py")
    command = command_on(host, launcher, ARGUMENTS)
    if launcher == "openmpi":
        command = ["env", f"HOME={far[1]}", *command[command.index("sh") :]]
    assert told(command, launcher) == (far[1] / "lib" / "py", ARGUMENTS[2:])


@pytest.mark.parametrize("launcher", ["ssh", "slurm"])
def test_this_host_needs_no_network(far, launcher):
    command = command_on(Host("here", (0,)), launcher, ARGUMENTS)
    assert command[:2] == ["sh", "-c"]
    assert told(command, launcher) == (far[0] / "wo rk", ARGUMENTS[2:])


@pytest.mark.parametrize(("name", "launcher"), [("here", "ssh"), ("far", "ssh"), ("far", "slurm")])
def test_no_shell_stays_before_it(far, name, launcher):
    """It would take the signals, and die of them without passing them on."""
    command = command_on(Host(name, (0,)), launcher, ["-c", "import os; print(os.getpid())"])
    process = subprocess.Popen(command, env=environment_of(launcher), stdout=subprocess.PIPE, text=True)
    assert int(process.communicate(timeout=600)[0]) == process.pid


def test_a_folder_outside_of_home_stays(far, tmp_path, monkeypatch):
    (tmp_path / "my home %hx").mkdir()  # begins like the home folder, and is none of it
    monkeypatch.chdir(tmp_path / "my home %hx")
    assert told(command_on(Host("far", (0,)), "ssh", ARGUMENTS), "ssh")[0] == tmp_path / "my home %hx"


def test_ssh_never_asks(far):
    command = command_on(Host("far", (0,)), "ssh", ["x"])
    assert command[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert command[command.index("--") + 1] == "far"
    os.environ["PDSH_SSH_ARGS_APPEND"] = "-p 2222"
    try:
        assert environment_of("pdsh")["PDSH_SSH_ARGS_APPEND"].startswith("-p 2222 -o BatchMode=yes")
    finally:
        del os.environ["PDSH_SSH_ARGS_APPEND"]


def test_a_slurm_step_has_the_node(far, tmp_path, monkeypatch):
    """All of its GPUs and cores, though the job may have asked for them by task; beside other steps."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_TRES_PER_TASK"):
        monkeypatch.setenv(name, "1")
    told(command_on(Host("far", (0, 1)), "slurm", ARGUMENTS), "slurm")
    options = (tmp_path / "calls").read_text().split(" sh -c ")[0].split()
    assert sorted(options) == [
        *("--cpu-bind=none", "--export=ALL", "--gpus-per-node=4", "--mpi=none"),
        *("--nodelist=far", "--nodes=1", "--ntasks=1", "--overlap"),
    ]
    of_tasks = {name for name in environment_of("slurm") if "PER_TASK" in name or "PER_NODE" in name}
    assert of_tasks == set()
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert not [word for word in command_on(Host("far", (0,)), "slurm", []) if word.startswith("--gpus")]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A Slurm job, as its batch step's environment tells it."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$3" = "n[1-2]" ] && echo n1 && echo n2 || { echo bad >&2; exit 1; }\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def of(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    of(JOB_NODELIST="n[1-2]")
    return of


@pytest.mark.parametrize(
    ("variables", "asked", "ranks"),
    [
        ({"GPUS_ON_NODE": "8", "NTASKS_PER_NODE": "1"}, None, 8),
        ({"GPUS_ON_NODE": "8", "GPUS_PER_NODE": "2"}, None, 2),  # whole nodes are the job's, and it asked for two
        ({"GPUS_PER_NODE": "a100:4"}, None, 4),
        ({"GPUS_PER_NODE": "a100:4,h100:2"}, None, 6),
        ({"NTASKS_PER_NODE": "3"}, None, 3),
        ({"GPUS_ON_NODE": "8"}, 2, 2),
        ({}, 5, 5),
    ],
)
def test_nodes_of_a_job(job, variables, asked, ranks):
    job(**variables)
    assert slurm_hosts(asked) == [Host("n1", tuple(range(ranks))), Host("n2", tuple(range(ranks)))]


def test_what_is_no_job(job, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="nothing tells how many ranks a node has: ask Slurm for --gpus-per-node"):
        slurm_hosts(None)
    job(GPUS_ON_NODE="0")
    with pytest.raises(ValueError, match="nothing tells how many ranks"):
        slurm_hosts(None)
    job(JOB_NODELIST="m[")
    with pytest.raises(ValueError, match=r"scontrol show hostnames m\[ failed: bad"):
        slurm_hosts(1)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="scontrol is not installed on this host"):
        slurm_hosts(1)
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    with pytest.raises(ValueError, match=r"this is no Slurm job \(SLURM_JOB_NODELIST is not set\)"):
        slurm_hosts(1)


def test_which_launcher(monkeypatch, tmp_path):
    def installed(*names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch(0o755)
        monkeypatch.setenv("PATH", str(folder))

    installed("ssh", "pdsh", "mpirun", "srun")
    chosen = {asked: choose_launcher(asked) for asked in ("auto", "ssh", "pdsh", "openmpi", "slurm")}
    assert chosen == {"auto": "pdsh", "ssh": "ssh", "pdsh": "pdsh", "openmpi": "openmpi", "slurm": "slurm"}
    installed("ssh")
    assert choose_launcher("auto") == "ssh"
    for launcher, program in (("pdsh", "pdsh"), ("openmpi", "mpirun"), ("slurm", "srun")):
        with pytest.raises(ValueError, match=f"--launcher {launcher}: {program} is not installed on this host"):
            choose_launcher(launcher)


def test_what_is_this_host():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert is_here(os.uname().nodename)
    assert not is_here("203.0.113.7")  # of documents, and nobody's
    assert not is_here("no-such-host.invalid")


RANK = """
import os, sys
from pathlib import Path
run, names = Path(sys.argv[1]), ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_DEBUG")
(run / f"rank_{os.environ['RANK']}").write_text(" ".join(os.environ[name] for name in names))
print("rank", os.environ["RANK"], "is here", file=sys.stderr)
"""
LAUNCH = (
    "import argparse, sys; from pathlib import Path; from lumina.cli_launch import hosts_of; "
    "from lumina.launch.supervisor import Supervisor; run, script = sys.argv[1:]; "
    "chosen = dict(hostfile=None, ranks=2, nodes=None, include=None, exclude=None, launcher='slurm'); "
    "hosts = hosts_of(argparse.Namespace(**chosen)); "
    "sys.exit(Supervisor(hosts, [script, run], Path(run), 0, environment={'NCCL_DEBUG': 'INFO'}).run())"
)


def test_a_run_on_two_nodes_of_a_job(job, tmp_path):
    """Agents are started by srun, one a node, and connect back; each starts two ranks."""
    srun, script, run = tmp_path / "srun", tmp_path / "rank.py", tmp_path / "run"
    srun.write_text(SRUN.format(home=shlex.quote(str(Path.home())), calls=shlex.quote(str(tmp_path / "calls"))))
    srun.chmod(0o755)
    script.write_text(RANK)
    done = subprocess.run([sys.executable, "-c", LAUNCH, run, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["rank 0 is here"]
    of = {path.name: path.read_text() for path in run.glob("rank_*")}
    assert of == {f"rank_{rank}": f"{rank} 4 {rank % 2} 2 INFO" for rank in range(4)}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(word for call in calls for word in call.split() if word.startswith("--nodelist=")) == [
        "--nodelist=n1",
        "--nodelist=n2",
    ]
    assert len(list((run / "logs" / "attempt_0").iterdir())) == 4
