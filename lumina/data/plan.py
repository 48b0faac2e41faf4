"""Planning: the lanes' packs dealt into global batches, the same under any number of ranks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumina.data.lanes import Lane, LaneState, Pack, PlannedSample, thresholds
from lumina.data.order import SetOrder

__all__ = ["DataState", "Pack", "Plan", "PlannedSample"]

_KEYS = ("packs", "index_hash", "epoch", "window", "lanes")


@dataclass(frozen=True)
class DataState:
    """Where the stream stands. Nothing in it depends on the number of ranks or workers.

    `packs` counts the packs handed out so far over all ranks; `index_hash` names the data set; within `window` samples
    a lane shuffles, so that under another one those that it has taken would be others.
    """

    packs: int
    index_hash: str
    window: int
    lanes: tuple[LaneState, ...]

    @classmethod
    def start(cls, index_hash: str, window: int, lanes: int, sets: int = 1) -> "DataState":
        """The beginning of the stream over the data set `index_hash`."""
        return cls(0, index_hash, window, (LaneState.start(sets),) * lanes)

    @property
    def epoch(self) -> int:
        """The epoch that every lane has reached in every set."""
        return min(epoch for lane in self.lanes for epoch, _ in lane.at)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_dict`."""
        return {
            "packs": self.packs,
            "index_hash": self.index_hash,
            "epoch": self.epoch,
            "window": self.window,
            "lanes": [lane.to_dict() for lane in self.lanes],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DataState":
        """The state written by `to_dict`; `ValueError` on a missing or unknown key, a wrong type or a bad hash."""
        if sorted(data) != sorted(_KEYS):
            raise ValueError(
                f"a data state has the keys {sorted(_KEYS)}, not {sorted(data)}; runs of an earlier version of the "
                "data order cannot go on with it"
            )
        packs, index_hash, lanes = data["packs"], data["index_hash"], data["lanes"]
        for name, least in (("packs", 0), ("window", 1)):
            if type(data[name]) is not int or data[name] < least:
                raise ValueError(
                    f"{name} of a data state must be a whole number of at least {least}, not {data[name]!r}"
                )
        if not isinstance(index_hash, str) or not re.fullmatch("[0-9a-f]{64}", index_hash):
            raise ValueError(f"index_hash of a data state must be 64 hex digits, not {index_hash!r}")
        if not isinstance(lanes, list) or not lanes:
            raise ValueError(f"lanes of a data state must be a list with an entry for each lane, not {lanes!r:.100}")
        return cls(packs, index_hash, data["window"], tuple(LaneState.from_dict(lane) for lane in lanes))


class Plan:
    """Packs of at most `tokens_per_pack` tokens, `global_batch_packs` a step, one lane after another.

    What is held does not grow with the samples or the steps: for each lane a window of ids and lengths.

    Args:
        starts: of each data set int64 (shards + 1,), id of the first sample of each of its shards, and the id after
            the last; ids go on from set to set.
        weights: how often samples come from each set, in proportion.
        tokens_of: (int64 ids (n,), step) → int (n,), their lengths in tokens in that step, from 1 to tokens_per_pack.
        lanes: independent streams of packs; a multiple of the ranks lets each rank read from its own shards.
        window: samples of a lane that are shuffled among themselves.

    Raises:
        ValueError: sizes below 1, no samples, weights that are not positive.
    """

    def __init__(
        self,
        starts: Sequence[np.ndarray],
        weights: Sequence[float],
        tokens_of: Callable[[np.ndarray, int], np.ndarray],
        *,
        tokens_per_pack: int,
        global_batch_packs: int,
        lanes: int,
        window: int,
        seed: int,
        stage_of: Callable[[int], int] = lambda step: 0,
    ):
        sizes = {
            "train.tokens_per_pack": tokens_per_pack,
            "train.global_batch_packs": global_batch_packs,
            "data.lanes": lanes,
            "data.shuffle_window": window,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for edges in starts:
            if edges[-1] == edges[0]:
                raise ValueError("there is nothing to plan: a data set holds no samples")
        if len(weights) != len(starts) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"each of {len(starts)} data sets needs a weight above 0, not {list(weights)}")
        shares = thresholds(weights) if sum(weights) < float("inf") else []
        if len({0, *shares}) <= len(weights):
            raise ValueError(
                f"data.sets: the weights {list(weights)} are too large, or too far apart for each to be drawn from; "
                "give numbers such as those of their samples"
            )
        self.tokens_per_pack, self.global_batch_packs, self.lanes = tokens_per_pack, global_batch_packs, lanes
        self.window, self.sets = window, len(starts)
        self._orders = [SetOrder(edges, lanes, window, seed, i) for i, edges in enumerate(starts)]
        self._thresholds, self._tokens_of, self._seed = shares, tokens_of, seed
        self._stage_of = stage_of
        self._live: tuple[DataState, int, list[Lane]] | None = None

    def tokens_of(self, ids: np.ndarray, step: int) -> np.ndarray:
        """Lengths in tokens, (n,), of samples (n,) as they are planned in `step`."""
        return self._tokens_of(ids, step)

    def start(self, index_hash: str) -> DataState:
        """The beginning of the stream."""
        return DataState.start(index_hash, self.window, self.lanes, self.sets)

    def batch(self, state: DataState, step: int = 1) -> tuple[list[Pack], DataState]:
        """The packs of the global batch of `step`, which starts at `state`, and the state after it.

        Raises:
            ValueError: the state is of another number of lanes or sets, or another window.
        """
        lanes = self._lanes_at(state, step)
        self._live = None  # if this fails half-way, they stand nowhere
        packs, states = [], list(state.lanes)
        for number in range(state.packs, state.packs + self.global_batch_packs):
            packs.append(lanes[number % self.lanes].next_pack(self.tokens_per_pack)[0])
        for number in {n % self.lanes for n in range(state.packs, state.packs + self.global_batch_packs)}:
            states[number] = lanes[number].state
        after = DataState(state.packs + len(packs), state.index_hash, state.window, tuple(states))
        self._live = after, self._stage_of(step), lanes
        return packs, after

    def waste(self, state: DataState, batches: int = 100, step: int = 1) -> float:
        """Share of the room in packs left unused over the next `batches` global batches, in [0, 1)."""
        if batches < 1:
            raise ValueError(f"waste is measured over at least 1 batch, not {batches}")
        lanes = self._lanes_at(state, step)
        self._live = None
        numbers = range(state.packs, state.packs + batches * self.global_batch_packs)
        used = sum(lanes[number % self.lanes].next_pack(self.tokens_per_pack)[1] for number in numbers)
        return 1 - used / (len(numbers) * self.tokens_per_pack)

    def _lanes_at(self, state: DataState, step: int) -> list[Lane]:
        """The lanes as they stand at `state`: those at work, if it is where they are."""
        if len(state.lanes) != self.lanes:
            raise ValueError(
                f"the data state has {len(state.lanes)} lanes, data.lanes={self.lanes}; "
                f"set data.lanes={len(state.lanes)} to go on with that run"
            )
        if any(len(lane.at) != self.sets for lane in state.lanes):
            raise ValueError(f"the data state is of {len(state.lanes[0].at)} data sets, there are {self.sets}")
        if state.window != self.window:
            raise ValueError(
                f"data.shuffle_window={self.window}, but the data state is of a run with {state.window}, where a lane "
                f"has taken other samples; set data.shuffle_window={state.window} to go on with it"
            )
        stage = self._stage_of(step)
        if self._live is not None and self._live[0] is state and self._live[1] == stage:
            return self._live[2]

        def tokens_of(ids: np.ndarray) -> np.ndarray:
            return self._tokens_of(ids, step)

        return [
            Lane(number, self._orders, self._thresholds, tokens_of, self._seed, lane)
            for number, lane in enumerate(state.lanes)
        ]
