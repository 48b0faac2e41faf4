"""Who sends what round a ring of ranks that share a pack, and when: arithmetic alone, without process groups.

Samples are packed and attend to themselves alone, so that of a pack of short samples each rank meets its neighbours at
most: distances at which nobody meets anybody are left out for all, with their messages.
"""

import bisect
import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lumina.kernels.attention_lse import Meeting, Meetings
from lumina.parallel.cuts import bounds


@dataclass(frozen=True)
class Work:
    """What a rank computes at one distance: rows of its queries and of the keys it holds, and who meets within them."""

    q_rows: slice
    k_rows: slice
    meetings: Meetings  # counted from the first of these rows


class Schedule:
    """Steps of a ring. At distance 0 all of a rank's tokens meet, if it has any; that work is there in any case.

    starts: of each rank's tokens, and the end.
    distances: ascending, the first is 0.
    """

    def __init__(self, lengths: tuple[int, ...], size: int):
        self.size, self.starts = size, bounds(sum(lengths), size)
        ends = [0, *accumulate(lengths)]
        self._held: list[dict[int, tuple[int, int]]] = []  # of each rank, the rows of each sample that it has tokens of
        ranks_of: dict[int, list[int]] = {}  # of each sample, which have tokens of it
        for rank, (start, stop) in enumerate(pairwise(self.starts)):
            first, last = bisect.bisect_right(ends, start) - 1, bisect.bisect_left(ends, stop)
            spans = {i: (max(ends[i], start) - start, min(ends[i + 1], stop) - start) for i in range(first, last)}
            self._held.append({i: span for i, span in spans.items() if span[0] < span[1]})
            for i in self._held[-1]:
                ranks_of.setdefault(i, []).append(rank)
        apart = {0}.union(*(_apart(ranks) for ranks in ranks_of.values()))
        self.distances = tuple(sorted({distance % size for distance in apart}))
        self._work: dict[int, tuple[Work | None, ...]] = {}

    def work(self, rank: int) -> tuple[Work | None, ...]:
        """Of each step; None where none of the rank's samples is in the keys that it holds."""
        if rank not in self._work:
            held = self._held
            found = [_work(held[rank], held[(rank - d) % self.size]) for d in self.distances]
            self._work[rank] = (found[0] or Work(slice(0, 0), slice(0, 0), ()), *found[1:])
        return self._work[rank]

    def rows(self, rank: int, step: int) -> int:
        """Tokens of the keys that `rank` holds at `step`."""
        owner = (rank - self.distances[step]) % self.size
        return self.starts[owner + 1] - self.starts[owner]

    def shift(self, step: int) -> int:
        """How many ranks further keys move to be where `step` needs them."""
        return self.distances[step] - self.distances[step - 1]


@functools.lru_cache(maxsize=256)
def schedule(lengths: tuple[int, ...], size: int) -> Schedule:
    """The ring of `size` ranks over a pack of samples with these numbers of tokens."""
    return Schedule(lengths, size)


def _apart(ranks: list[int]) -> set[int]:
    """How far any two of these are from each other, both ways."""
    if ranks[-1] - ranks[0] < len(ranks):  # one after another: all but in packs of fewer tokens than ranks
        return set(range(1 - len(ranks), len(ranks)))
    return {a - b for a in ranks for b in ranks}


def _work(queries: dict[int, tuple[int, int]], keys: dict[int, tuple[int, int]]) -> Work | None:
    common = [i for i in queries if i in keys]
    if not common:
        return None
    q0, k0 = queries[common[0]][0], keys[common[0]][0]
    meetings = []
    for i in common:
        (q_start, q_stop), (k_start, k_stop) = queries[i], keys[i]
        meetings.append(Meeting(q_start - q0, q_stop - q0, k_start - k0, k_stop - k0))
    return Work(slice(q0, queries[common[-1]][1]), slice(k0, keys[common[-1]][1]), tuple(meetings))
