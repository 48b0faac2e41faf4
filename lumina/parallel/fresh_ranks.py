"""Work that every rank gives to a new process, so that what fails or is killed there takes nothing else with it.

A rank that has run out of memory cannot be told to forget the step it was in, nor can those that wait for it in a
collective. Here all processes of the work are ended together, and the ranks themselves, which hold no device, go on.
"""

import multiprocessing
import os
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lumina.parallel.mesh import World

_TIMEOUT = timedelta(minutes=30)
_LOOK_EVERY = 0.2  # seconds
# An error may be that of a collective whose other end is gone: so long another rank has to say that it is the cause.
_GRACE = 10  # seconds
_DONE, _FAILED, _UNSURE = "done", "failed", "unsure"
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True)
class Failure:
    """Of a piece of work: the rank that was the first to fail, and why."""

    rank: int
    why: str


@dataclass(frozen=True)
class _Meeting:
    """Where the processes of a piece of work find each other: a part of the store of all ranks."""

    name: str
    world: World

    def open(self) -> dist.Store | None:
        if self.world.size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore(self.name, dist.TCPStore(address, port, is_master=False, timeout=_TIMEOUT))


class FreshRanks:
    """The ranks of a launcher. All of them make one, and `run` the same work in the same order; a context manager."""

    def __init__(self, preload: Sequence[str] = (), debug: bool = False):
        """
        Args:
            preload: modules that the work imports. On a CPU they are imported once for all pieces of work.
            debug: show where work failed.
        """
        self.world = World.from_environment()
        self._debug, self._pieces = debug, 0
        self._context = _context(preload)
        if self.world.size == 1:
            self._store = dist.HashStore()
        else:
            self._store, _, _ = next(rendezvous("env://", self.world.rank, self.world.size, timeout=_TIMEOUT))
        # Of this start of the ranks: torchrun keeps its store when it starts them again.
        if self.world.rank == 0:
            self._store.set("lumina: name", uuid.uuid4().hex)
        self._name = self._store.get("lumina: name").decode()

    def __enter__(self) -> "FreshRanks":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        # The store may live in the first rank.
        self._store.add("lumina: left", 1)
        while self.world.rank == 0 and self._store.add("lumina: left", 0) < self.world.size:
            time.sleep(_LOOK_EVERY)

    def run(self, work: Callable[..., Any], *arguments: object) -> Any:
        """`work(store, *arguments)` in a new process of each rank; what this rank's returned, or on all the `Failure`.

        Args:
            work: of a module. `store` is for `open_mesh`; its process ends without closing what it has opened.
        """
        piece = f"{self._name}/{self._pieces}"
        self._pieces += 1
        here, there = self._context.Pipe()
        meeting = _Meeting(f"{piece}/work", self.world)
        given = (there, dict(os.environ), torch.get_num_threads(), self._debug, meeting, work, arguments)
        process = self._context.Process(target=_run, args=given, daemon=True)
        process.start()
        there.close()
        try:
            return self._attend(piece, process, here)
        finally:
            process.kill()
            process.join()
            here.close()

    def _attend(self, piece: str, process: Any, connection: Connection) -> Any:
        state, answer, since = None, None, 0.0
        while True:
            if state is not None:
                time.sleep(_LOOK_EVERY)
            elif connection.poll(_LOOK_EVERY):
                state, answer = _received(connection, process)
                since = time.monotonic()
                if state == _DONE:
                    self._store.add(f"{piece}/done", 1)
            sure = state == _FAILED or (state == _UNSURE and time.monotonic() > since + _GRACE)
            if sure and self._store.add(f"{piece}/failures", 1) == 1:
                self._store.set(f"{piece}/failure", f"{self.world.rank} {answer}")
            if self._store.check([f"{piece}/failure"]):
                rank, why = self._store.get(f"{piece}/failure").decode().split(" ", 1)
                return Failure(int(rank), why)
            if state == _DONE and self._store.add(f"{piece}/done", 0) == self.world.size:
                return answer


def _context(preload: Sequence[str]) -> Any:
    # A process that has looked for GPUs, as imports may, cannot be forked into one that uses them.
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _received(connection: Connection, process: Any) -> tuple[str, Any]:
    """(how it ended, what it answered or why it failed)."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
    if process.exitcode == -signal.SIGKILL:
        return _FAILED, "out of memory, by all appearances: the system killed the process (SIGKILL)"
    if process.exitcode < 0:
        return _UNSURE, f"the process was ended by {signal.Signals(-process.exitcode).name}"
    return _UNSURE, f"the process ended with exit code {process.exitcode}"


def _run(
    connection: Connection,
    environment: dict[str, str],
    threads: int,
    debug: bool,
    meeting: _Meeting,
    work: Callable[..., Any],
    arguments: Sequence[object],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; ranks end their processes
    os.environ.update(environment)  # a fork server has its own
    torch.set_num_threads(threads)
    try:
        answer = (_DONE, work(meeting.open(), *arguments))
    except Exception as error:  # noqa: BLE001 - it is said by the rank
        if debug:
            traceback.print_exc()
        answer = (_FAILED if isinstance(error, ValueError) or _is_of_memory(error) else _UNSURE, _why(error))
    # Nothing is closed: others may wait for this process in a collective, and are to be ended by their rank, rather
    # than to fail by themselves and be taken for the cause.
    connection.send(answer)
    try:
        connection.recv()
    except (EOFError, ConnectionResetError):
        os._exit(0)


def _why(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if _is_of_memory(error):
        return f"out of memory: {said}"
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY in str(error)
