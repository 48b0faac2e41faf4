"""How fast ranks exchange bytes: all-reduce over a group, and messages between two of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.parallel.mesh import Mesh

_FIRST_BYTES = 1 << 16
_GROWTH = 4
_PINGS = 20


@dataclass(frozen=True)
class Timing:
    """Of `bytes` at once: the fastest repetition, as others wait for the processor too. `latency`: one way."""

    bytes: int
    seconds: float
    latency: float = 0.0


class Exchange:
    """Measurements on this rank. All ranks that take part in one call it together."""

    def __init__(self, mesh: Mesh, largest: int, repeats: int, seconds: float):
        """
        Args:
            largest: bytes of a message.
            repeats: of each measurement.
            seconds: about what a measurement takes; where `largest` takes longer, messages are smaller.
        """
        self._device, self._repeats, self._largest = mesh.device, repeats, max(largest, _FIRST_BYTES)
        self._pause = seconds / repeats
        self._small = torch.zeros(1, device=mesh.device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Timing:
        """Over a group, or all ranks; the same on each, and of its slowest."""

        def once(numel: int) -> float:
            values = torch.zeros(numel, device=self._device)
            dist.all_reduce(self._small, group=group)  # all are there
            seconds = self._timed(lambda: dist.all_reduce(values, group=group))
            longest = torch.tensor(seconds, device=self._device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
            return float(longest)

        return self._measured(once, lambda more: more)

    def with_peer(self, peer: int, first: bool) -> Timing:
        """Messages from this rank to `peer`, which measures those to this one; `first` of exactly one of the two."""
        for sends in (first, not first):  # connections are made by the first messages
            self._ping(peer, sends)
        latency = statistics.median(self._timed(lambda: self._ping(peer, first)) for _ in range(_PINGS)) / 2
        result = None
        for sends in (first, not first):
            if sends:
                result = self._send(peer, latency)
            else:
                self._receive(peer)
        return result

    def _send(self, peer: int, latency: float) -> Timing:
        def once(numel: int) -> float:
            values = torch.zeros(numel, device=self._device)
            return self._timed(lambda: self._message(peer, values))

        def told(numel: int) -> int:
            dist.send(torch.tensor([numel], device=self._device), peer)
            return numel

        found = self._measured(once, told)
        told(0)
        # The answer that ends the timing takes a latency; of a short message it is never taken for all.
        return Timing(found.bytes, max(found.seconds - latency, found.seconds / 2), latency)

    def _message(self, peer: int, values: Tensor) -> None:
        dist.send(values, peer)
        dist.recv(self._small, peer)

    def _receive(self, peer: int) -> None:
        numel = torch.zeros(1, dtype=torch.int64, device=self._device)
        while True:
            dist.recv(numel, peer)
            if not (count := int(numel)):
                return
            dist.recv(torch.empty(count, device=self._device), peer)
            dist.send(self._small, peer)

    def _ping(self, peer: int, sends: bool) -> None:
        for sending in (sends, not sends):
            (dist.send if sending else dist.recv)(self._small, peer)

    def _measured(self, once: Callable[[int], float], told: Callable[[int], int]) -> Timing:
        """`once(numel)`, of which `told` lets others know first; larger until it takes its time, and then repeated."""
        size = _FIRST_BYTES
        while once(told(size // 4)) < self._pause / _GROWTH and size < self._largest:
            size = min(self._largest, size * _GROWTH)
        return Timing(size, min(once(told(size // 4)) for _ in range(self._repeats)))

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def group_of(mesh: Mesh, sets: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The process group of the set of ranks that this one is in, each rank in one of them."""
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sets])
    return group


def backend_of() -> str:
    """gloo or nccl."""
    return dist.get_backend()
