"""What processes cost: time of the cores and memory, of a process with all that it started."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """`function(*arguments)` in a new process that shares nothing with this one; its error is raised here.

    Args:
        function: of a module, so that the process can import it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def cpu_seconds() -> float:
    """User and system time of this process and its descendants so far, with those that have ended."""
    import psutil

    total = 0.0
    for process in _tree():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class Memory(NamedTuple):
    """Bytes held by processes together.

    resident: pages that several share count for each.
    proportional: they count once.
    """

    resident: int
    proportional: int


def memory() -> Memory:
    """Of this process and its living descendants. `ValueError` where this is not Linux."""
    import psutil

    resident = proportional = 0
    for process in _tree():
        try:
            held = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        if not hasattr(held, "pss"):
            raise ValueError("memory that processes share is told apart on Linux alone; measure there")
        resident, proportional = resident + held.rss, proportional + held.pss
    return Memory(resident, proportional)


def _tree() -> list:
    import psutil

    this = psutil.Process()
    return [this, *this.children(recursive=True)]
