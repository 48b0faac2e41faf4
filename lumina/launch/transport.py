"""How a command comes to run on a host: by ssh, pdsh, Open MPI or Slurm."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from lumina.launch.hostfile import Host

LAUNCHERS = ("pdsh", "ssh", "openmpi", "slurm")
_PROGRAM = {"pdsh": "pdsh", "ssh": "ssh", "openmpi": "mpirun", "slurm": "srun"}
# From these srun would take what one task of the job is to have; an agent has the node.
_OF_TASKS = ("SLURM_NTASKS_PER_NODE", "SLURM_TRES_PER_TASK", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK")
_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")


def choose_launcher(asked: str) -> str:
    """Which of `LAUNCHERS`: the one asked for, or with "auto" pdsh if it is installed, else ssh.

    Raises:
        ValueError: where its program is not installed.
    """
    launcher = asked if asked != "auto" else ("pdsh" if shutil.which("pdsh") else "ssh")
    if shutil.which(_PROGRAM[launcher]) is None:
        raise ValueError(f"--launcher {launcher}: {_PROGRAM[launcher]} is not installed on this host")
    return launcher


def command_on(host: Host, launcher: str, arguments: list[str]) -> list[str]:
    """What to run here, so that Python runs with `arguments` there, in the folder of Lumina's runs."""
    if is_here(host.name):
        script = f"cd {shlex.quote(host.directory or os.getcwd())} && exec {_python(host, sys.executable, arguments)}"
        return ["sh", "-c", script]
    directory = host.directory or _below_home(os.getcwd())
    script = f"cd {_quoted(directory)} && exec {_python(host, _below_home(sys.executable), arguments)}"
    if launcher == "ssh":
        return ["ssh", *_SSH, "--", host.name, script]
    if launcher == "pdsh":
        # It calls ssh; of the script it replaces %h, %u and %n.
        return ["pdsh", "-S", "-N", "-R", "ssh", "-w", host.name, script.replace("%", "%%")]
    if launcher == "openmpi":
        as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return ["mpirun", *as_root, "--host", f"{host.name}:1", "-n", "1", "--bind-to", "none", "sh", "-c", script]
    # A step of its own on the node, beside others, with all that the job has there.
    step = ["--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap", "--cpu-bind=none", "--mpi=none"]
    if gpus := _gpus_of_a_node():
        step.append(f"--gpus-per-node={gpus}")  # of a job that asks for them by task, one task would get its share
    return ["srun", *step, "--export=ALL", "sh", "-c", script]


def environment_of(launcher: str) -> dict[str, str]:
    """Of the program that runs a command elsewhere."""
    if launcher == "slurm":
        return {name: value for name, value in os.environ.items() if name not in _OF_TASKS}
    if launcher != "pdsh":
        return dict(os.environ)
    more = " ".join(_SSH)
    return os.environ | {"PDSH_SSH_ARGS_APPEND": f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {more}".strip()}


def is_here(name: str) -> bool:
    """Whether a name means this host."""
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:  # ssh may know it by another name
        return False
    return bool(found & {address for _, address in addresses(loopback=True)})


def addresses(loopback: bool = False) -> list[tuple[str, str]]:
    """Interface and IPv4 address of this host's networks."""
    return [
        (interface, address.address)
        for interface, of_it in psutil.net_if_addrs().items()
        for address in of_it
        if address.family == socket.AF_INET and (loopback or not address.address.startswith("127."))
    ]


def slurm_hosts(ranks_per_host: int | None) -> list[Host]:
    """The nodes of the Slurm job that this process is in.

    Raises:
        ValueError: outside of a job, and where nothing tells the ranks of a node.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise ValueError("--launcher slurm without --hostfile: this is no Slurm job (SLURM_JOB_NODELIST is not set)")
    if shutil.which("scontrol") is None:
        raise ValueError("--launcher slurm: scontrol is not installed on this host")
    found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"scontrol show hostnames {nodes} failed: {found.stderr.strip()}")
    told = ranks_per_host or _gpus_of_a_node() or _number_in("SLURM_NTASKS_PER_NODE")
    if told is None:
        raise ValueError("nothing tells how many ranks a node has: ask Slurm for --gpus-per-node, or give --ranks N")
    return [Host(name, tuple(range(told))) for name in found.stdout.split()]


def _gpus_of_a_node() -> int | None:
    """As the job has asked for; a job that has whole nodes may have been given more on them."""
    return _number_in("SLURM_GPUS_PER_NODE") or _number_in("SLURM_GPUS_ON_NODE")


def _number_in(name: str) -> int | None:
    """Of a variable such as "8" or "a100:4,h100:4", whose types do not matter here; None where there is none."""
    numbers = [part.rpartition(":")[2] for part in os.environ.get(name, "").split(",")]
    return sum(map(int, numbers)) or None if all(number.isdigit() for number in numbers) else None


def _python(host: Host, default: str, arguments: list[str]) -> str:
    return f"{_quoted(host.python or default)} {shlex.join(arguments)}"


def _below_home(path: str) -> str:
    """With "~" for the home folder, which may be another one on another host."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path == home or path.startswith(home + os.sep) else path


def _quoted(path: str) -> str:
    if path == "~" or path.startswith("~/"):
        return f'"$HOME"{shlex.quote(path[1:]) if path[1:] else ""}'
    return shlex.quote(path)
