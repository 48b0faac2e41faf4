"""The processes of one attempt on this host: each in a session of its own, none of which outlives the supervisor."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lumina.launch.messages import Start

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_POLL_SECONDS = 0.02
_KILLED_SECONDS = 10.0
# What another launcher left in the environment would send rank 0 to that launcher's store.
_FOREIGN = ("TORCHELASTIC_", "PMI_", "OMPI_")


@dataclass
class Rank:
    """A process, the file of its output, and its exit code (that of a signal negative) once it has ended."""

    number: int
    process: subprocess.Popen
    log: Path
    code: int | None = None


class LocalRanks:
    """`world` processes on this host that run `command`, started when this is made. End them with `end`."""

    def __init__(self, start: Start, logs: Path, port: socket.socket | None = None):
        """
        Args:
            start: what to start.
            logs: a folder that is there.
            port: held for rank 0 until all have ended.
        """
        self.host = socket.gethostname()
        self._not_ours = {child.pid for child in psutil.Process().children(recursive=True)}
        libc = ctypes.CDLL(None, use_errno=True)
        # What ranks have started and left behind becomes a child of this process, which ends it.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._port = port
        self.all: list[Rank] = []
        try:
            for local in range(start.count):
                self.all.append(self._start(start, local, logs, libc))
        except BaseException:
            self.end(0.0)
            raise

    def _start(self, start: Start, local: int, logs: Path, libc: ctypes.CDLL) -> Rank:
        number = start.first + local
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment |= start.environment
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // start.count)))
        if start.world == start.count:  # no other host: nobody's network setup matters
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if start.slots is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, start.slots))
        environment |= {
            "RANK": str(number),
            "WORLD_SIZE": str(start.world),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(start.count),
            "MASTER_ADDR": start.master_address,
            "MASTER_PORT": str(start.master_port),
        }
        log = logs / f"rank_{number:05d}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *start.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ends_with(os.getpid(), libc),
            )
        return Rank(number, process, log)

    def newly_ended(self) -> list[Rank]:
        """Ranks that have ended since this was last asked, those that a signal ended first: others follow from it."""
        found = []
        for rank in self.all:
            if rank.code is None:
                # It is not reaped yet: as long as it is not, its number cannot become another process group's.
                state = os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if state is not None:
                    rank.code = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
                    found.append(rank)
        return sorted(found, key=lambda rank: rank.code)

    @property
    def living(self) -> list[Rank]:
        """Ranks that have not ended, as far as `newly_ended` has seen."""
        return [rank for rank in self.all if rank.code is None]

    def signal(self, number: int) -> None:
        """To the ranks alone: what they have started is theirs to end."""
        for rank in self.living:
            os.kill(rank.process.pid, number)

    def end(self, grace: float) -> None:
        """SIGTERM, and after `grace` seconds SIGKILL, to all that is left; nothing is left then.

        Raises:
            RuntimeError: where a process cannot be killed, as one that waits for a broken disk or device cannot.
        """
        self.newly_ended()
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(not _is_stopped(rank) for rank in self.living):
            time.sleep(_POLL_SECONDS)
            self.newly_ended()
        self.newly_ended()
        for rank in self.all:
            if rank.process.returncode is None:
                os.killpg(rank.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILLED_SECONDS
        for rank in self.all:
            try:
                code = rank.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(
                    f"rank {rank.number} on {self.host} (pid {rank.process.pid}) cannot be killed: it waits for a disk "
                    "or a device that does not answer; look at `dmesg`, and start again when it is gone"
                ) from error
            rank.code = code if rank.code is None else rank.code
        self._sweep(deadline)
        if self._port is not None:
            self._port.close()

    def _sweep(self, deadline: float) -> None:
        """What ranks had started in sessions of their own."""
        while left := [c for c in psutil.Process().children(recursive=True) if c.pid not in self._not_ours]:
            for child in left:
                try:
                    child.kill()
                    child.wait(0.1)
                except (psutil.NoSuchProcess, psutil.TimeoutExpired):
                    continue
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes of ranks cannot be killed: {', '.join(str(c.pid) for c in left)}")


def held_port() -> socket.socket:
    """A socket that holds a free TCP port until it is closed, and does not listen.

    The system gives the port to nobody else meanwhile, but lets rank 0 listen there, for both set SO_REUSEADDR.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def ends_with(parent: int, libc: ctypes.CDLL) -> Callable[[], None]:
    """Run in the child: it is killed when its parent dies, even by SIGKILL."""

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return prepare


def _is_stopped(rank: Rank) -> bool:
    """Whether it can do nothing about a SIGTERM."""
    return psutil.Process(rank.process.pid).status() == psutil.STATUS_STOPPED
