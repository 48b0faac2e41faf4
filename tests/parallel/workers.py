"""Running a function on several gloo ranks, each a process of its own."""

import faulthandler
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.multiprocessing as mp

PATIENCE = 1800.0
"""Seconds after which something hangs, on a machine however slow: a guard, which nothing is to come near."""
_held: deque[socket.socket] = deque(maxlen=300)  # more than any test asks for before it uses them


def free_port() -> int:
    """A TCP port that the system gives to no other test meanwhile, however late it is used."""
    from lumina.launch.ranks import held_port

    _held.append(held_port())
    return _held[-1].getsockname()[1]


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, timeout: float = PATIENCE, start: str = "forkserver"
) -> list[Any]:
    """`function(rank, *arguments)` on `world` processes; what each returned, by rank.

    Ranks are forked from a process that has imported what they need and done nothing else; `start="spawn"` makes new
    ones, which see this process's environment.

    Raises:
        AssertionError: with the first traceback, where any rank failed; or where they have not all answered after
            `timeout` seconds: each then says on stderr where it stands.
    """
    ranks, queue = start_ranks(world, function, *arguments, port=free_port(), timeout=timeout, start=start)
    results: dict[int, Any] = {}
    failures = []
    deadline = time.monotonic() + timeout + 10
    for _ in range(world):
        rank, result, failure = _next_answer(queue, ranks, results, deadline)
        results[rank] = result
        if failure:
            failures.append(f"rank {rank}:\n{failure}")
            for process in ranks:
                process.kill()  # what waits for another in a collective does not end when it is asked to
            break
    for process in ranks:
        process.join(timeout)
    assert not failures, failures[0]
    return [results[rank] for rank in range(world)]


def start_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    port: int,
    timeout: float = PATIENCE,
    start: str = "forkserver",
) -> tuple[list, Any]:
    """The processes of `run_ranks`, running, and the queue of (rank, result, failure) to which they answer."""
    context = mp.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["tests.parallel.preload"])
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(queue, rank, world, port, timeout, function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks, queue


def _next_answer(queue, ranks, results, deadline) -> tuple[int, Any, str | None]:
    """(rank, result, failure); of rank -1 where none will come."""
    while True:
        dead = [(rank, p.exitcode) for rank, p in enumerate(ranks) if rank not in results and p.exitcode]
        try:
            return queue.get(timeout=1)
        except Empty:
            if dead:
                return -1, None, f"died without a word: (rank, exit code) {dead}"
            if time.monotonic() > deadline:
                return -1, None, f"only the ranks {sorted(results)} answered"


def _rank(queue, rank: int, world: int, port: int, timeout: float, function: Callable, arguments: tuple) -> None:
    faulthandler.dump_traceback_later(timeout)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(rank, *arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
