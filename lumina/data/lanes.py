"""A lane: an endless stream of samples, blended from the data sets, cut into packs.

What a lane holds is small and does not grow: where it stands in each set, and the few samples that wait for a pack.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumina.data.order import SetOrder, random_words

WAITING = 32
"""Samples among which a lane looks for one that fits: on mixes of sizes, packs are then 98 to 99.9% full."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ ÷ the golden ratio: its multiples fall evenly on the circle
_WORD = 2**64


@dataclass(frozen=True)
class PlannedSample:
    """One place in the stream. (sample_id, epoch, occurrence) names it once; all randomness is drawn from it."""

    sample_id: int
    epoch: int
    occurrence: int = 0


Pack = tuple[PlannedSample, ...]


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands.

    Attributes:
        drawn: samples it has taken from the sets so far.
        at: of each set (epoch, how many samples of the lane's share of it were taken).
        waiting: (sample id, epoch) of those taken that no pack has yet, longest waiting first.
    """

    drawn: int
    at: tuple[tuple[int, int], ...]
    waiting: tuple[tuple[int, int], ...]

    @classmethod
    def start(cls, sets: int) -> "LaneState":
        """Before the first sample."""
        return cls(0, ((0, 0),) * sets, ())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_dict`."""
        return {"drawn": self.drawn, "at": [list(at) for at in self.at], "waiting": [list(w) for w in self.waiting]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LaneState":
        """What `to_dict` gave; `ValueError` for anything else."""
        try:
            drawn, at, waiting = data["drawn"], data["at"], data["waiting"]
            pairs = [tuple(pair) for pair in (*at, *waiting)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a lane's state has drawn, at and waiting, not {data!r:.100}") from error
        numbers = [drawn, *(number for pair in pairs for number in pair)]
        if not all(type(number) is int and number >= 0 for number in numbers) or any(len(p) != 2 for p in pairs):
            raise ValueError("drawn, at and waiting of a lane's state are whole numbers of at least 0, in pairs")
        return cls(drawn, tuple(pairs[: len(at)]), tuple(pairs[len(at) :]))


class Lane:
    """One lane at work, from `state` on.

    Args:
        number: which lane.
        orders: of each set.
        thresholds: shares of the sets added up, on a scale of 2⁶⁴; see `thresholds`.
        tokens_of: int64 ids (n,) → int (n,), their lengths in tokens, all at least 1.
        seed: of the run.
        state: where it begins.
    """

    def __init__(
        self,
        number: int,
        orders: Sequence[SetOrder],
        thresholds: Sequence[int],
        tokens_of: Callable[[np.ndarray], np.ndarray],
        seed: int,
        state: LaneState,
    ):
        self._thresholds = thresholds
        self._offset = int(random_words(1, "blend", seed, number)[0])
        self._drawn = state.drawn
        self._sources = [
            _Source(order, number, epoch, taken, tokens_of)
            for order, (epoch, taken) in zip(orders, state.at, strict=True)
        ]
        lengths = tokens_of(np.array([sample for sample, _ in state.waiting], np.int64)) if state.waiting else ()
        self._waiting = [
            (int(length), sample, epoch) for length, (sample, epoch) in zip(lengths, state.waiting, strict=True)
        ]

    @property
    def state(self) -> LaneState:
        """Where it stands now."""
        at = tuple((source.epoch, source.taken) for source in self._sources)
        return LaneState(self._drawn, at, tuple((sample, epoch) for _, sample, epoch in self._waiting))

    def next_pack(self, tokens_per_pack: int) -> tuple[Pack, int]:
        """The next pack and its tokens: samples in the order they came, those passed over that do not fit any more.

        The sample that has waited longest is always in it, so none waits for ever.
        """
        waiting = self._waiting
        while len(waiting) < WAITING:
            waiting.append(self._draw())
        room, pack, i = tokens_per_pack, [], 0
        while i < WAITING:
            length, sample, epoch = waiting[i]
            if length > room:
                i += 1
                continue
            pack.append(PlannedSample(sample, epoch))
            room -= length
            del waiting[i]
            waiting.append(self._draw())
        return tuple(pack), tokens_per_pack - room

    def _draw(self) -> tuple[int, int, int]:
        point = (self._drawn * _GOLDEN + self._offset) % _WORD
        source = next(s for s, edge in zip(self._sources, self._thresholds, strict=True) if point < edge)
        self._drawn += 1
        return source.next()


class _Source:
    """A lane's share of one set, without end."""

    def __init__(self, order: SetOrder, lane: int, epoch: int, taken: int, tokens_of: Callable):
        self._order, self._lane, self._tokens_of = order, lane, tokens_of
        self.epoch, self.taken = epoch, taken
        self._window = -1
        self._ids: list[int] = []
        self._lengths: list[int] = []

    def next(self) -> tuple[int, int, int]:
        """(length, sample id, epoch)."""
        while True:
            window, row = divmod(self.taken, self._order.window)
            if window != self._window:
                self._load(window)
            if row < len(self._ids):
                self.taken += 1
                return self._lengths[row], self._ids[row], self.epoch
            self.epoch, self.taken, self._window = self.epoch + 1, 0, -1

    def _load(self, window: int) -> None:
        ids = self._order.samples(self.epoch, self._lane, window)
        self._window = window
        self._ids, self._lengths = ids.tolist(), self._tokens_of(ids).tolist() if len(ids) else []


def thresholds(weights: Sequence[float]) -> list[int]:
    """Shares of the sets, in proportion to `weights`, added up on a scale of 2⁶⁴; the last is 2⁶⁴."""
    total, edges, reached = sum(weights), [], 0.0
    for weight in weights:
        reached += weight
        edges.append(int(reached / total * _WORD))
    return [*edges[:-1], _WORD]
