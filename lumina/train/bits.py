"""Exact checksums of what only the optimizer may change: flipped bits are found, and named, before they spread.

Two checks. From one update to the next nothing that a rank holds may change: it sums its bits after the one and before
the other. And replicas hold the same: they compare their sums. The first is local and says which rank; it sees a flip
in the time that it watched. The second sees one whenever it came, where there are replicas.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lumina.parallel.fragments import Held

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Up to so many bytes are checked in every step, in a few milliseconds; more as often as keeps it below the share.
_SMALL, _SHARE = 1 << 23, 0.0075


def checksum(values: Tensor) -> Tensor:
    """The sum, modulo 2⁶⁴, of the bits of contiguous `values` read as integers: another for any one flipped bit.

    Returns:
        int64, a scalar on the device of `values`.
    """
    flat = values.detach().view(-1)
    size = flat.element_size()
    # Eight bytes at a time from a multiple of eight of the storage on: far faster than widening each element.
    head = min(-flat.storage_offset() % (8 // size), flat.numel())
    tail = head + (flat.numel() - head) * size // 8 * 8 // size
    if head == 0 and tail == flat.numel() > 0:
        return flat.view(torch.int64).sum()
    pieces = ((flat[head:tail], torch.int64), (flat[:head], _INTEGER[size]), (flat[tail:], _INTEGER[size]))
    sums = [piece.view(integer).sum(dtype=torch.int64) for piece, integer in pieces if piece.numel()]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=flat.device)


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The checksum of each, int64 (n,) on the CPU; each device is waited for once."""
    sums = [checksum(values) for values in tensors]
    result = torch.zeros(len(sums), dtype=torch.int64)
    for device in {one.device for one in sums}:
        here = [i for i, one in enumerate(sums) if one.device == device]
        result[here] = torch.stack([sums[i] for i in here]).cpu()
    return result


class Watch:
    """Holds the checksums of what a rank has from one update to the next.

    A stretch between two updates is watched where less than 8 MiB are held, where that costs less than 0.75% of the
    time since the last one that was, and at the latest after `every` of them.

    Args:
        held: gives what is watched, the same in the same order every time.
        every: in steps.
    """

    def __init__(self, held: Callable[[], Iterable[Held]], every: int, clock: Callable[[], float] = time.perf_counter):
        self._held, self._every, self._clock = held, every, clock
        self._sealed: Tensor | None = None
        self._unwatched = 0
        self._small = False
        self._seconds: dict[str, float] = {}  # the least that each half of a check has taken: less is disturbance
        self._last = clock()

    def seal(self) -> None:
        """After an update: take the checksums of what is held now, if the stretch that begins is watched."""
        elapsed, cost = self._clock() - self._last, sum(self._seconds.values())
        self._sealed = None
        self._unwatched += 1
        if self._small or cost <= _SHARE * elapsed or self._unwatched >= self._every:
            self.sums()

    def sums(self) -> Tensor:
        """The checksums of what is held since the last update; the stretch is watched from here on if it was not."""
        if self._sealed is None:
            self._unwatched, self._last = 0, self._clock()
            self._sealed = self._timed("seal")
        return self._sealed

    def changed(self) -> list[Held]:
        """Before the next update: what is not as it was sealed; nothing where this stretch was not watched."""
        if self._sealed is None:
            return []
        found = (self._timed("compare") != self._sealed).nonzero().flatten().tolist()
        return [held for i, held in enumerate(self._held()) if i in found] if found else []

    def _timed(self, what: str) -> Tensor:
        held = [one.values for one in self._held()]
        self._small = sum(values.nbytes for values in held) <= _SMALL
        if any(values.is_cuda for values in held):
            torch.cuda.synchronize()  # or the time would be that of what was asked for before
        started = self._clock()
        sums = checksums(held)
        self._seconds[what] = min(self._clock() - started, self._seconds.get(what, float("inf")))
        return sums


def dissenters(sums: Tensor) -> dict[int, list[list[int]]]:
    """Which replicas differ, and in what.

    Args:
        sums: int64 (replicas, n), the checksums of each.

    Returns:
        By column in which not all agree: the groups of replicas that agree with each other, the majority (more than
        half) left out; where there is none, all groups.
    """
    found = {}
    for column in (sums != sums[0]).any(0).nonzero().flatten().tolist():
        values = sums[:, column].tolist()
        (most, count), *_ = Counter(values).most_common(1)
        groups: dict[int, list[int]] = {}
        for replica, value in enumerate(values):
            if value != most or 2 * count <= len(values):
                groups.setdefault(value, []).append(replica)
        found[column] = list(groups.values())
    return found
