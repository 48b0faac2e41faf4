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


@dataclass(frozen=True, eq=False)
class Schedule:
    """Steps of the ring. `work[rank][step]` is None where none of the rank's samples is in the keys that it holds.

    At distance 0 all of a rank's tokens meet, if it has any; that work is there in any case.
    """

    size: int
    starts: tuple[int, ...]  # of each rank's tokens, and the end
    distances: tuple[int, ...]  # ascending, the first is 0
    work: tuple[tuple[Work | None, ...], ...]

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
    starts = bounds(sum(lengths), size)
    ends = [0, *accumulate(lengths)]
    held = []  # of each rank, the rows of each sample that it has tokens of
    for start, stop in pairwise(starts):
        first, last = bisect.bisect_right(ends, start) - 1, bisect.bisect_left(ends, stop)
        spans = {i: (max(ends[i], start) - start, min(ends[i + 1], stop) - start) for i in range(first, last)}
        held.append({i: span for i, span in spans.items() if span[0] < span[1]})
    by_distance = {d: [_work(held[rank], held[(rank - d) % size]) for rank in range(size)] for d in range(size)}
    by_distance[0] = [work or Work(slice(0, 0), slice(0, 0), ()) for work in by_distance[0]]
    distances = tuple(d for d, work in by_distance.items() if any(work))
    work = tuple(tuple(by_distance[d][rank] for d in distances) for rank in range(size))
    return Schedule(size, starts, distances, work)


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
