"""The loader: this rank's packs of each global batch, decoded ahead, bad samples replaced, counted and bounded."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.data.decode import BadSampleError, cropped_size
from lumina.data.index import Index
from lumina.data.order import replacement_candidates
from lumina.data.plan import DataState, Pack, Plan, PlannedSample
from lumina.data.workers import PackDecoder, RawSample, decoded_in_order


@dataclass
class Sample:
    """A decoded sample: `pixels` (frames, channels, height, width) float32 in [-1, 1].

    (sample_id, epoch, occurrence) names this place in the stream; occurrence is above 0 for a replacement.
    """

    sample_id: int
    epoch: int
    occurrence: int
    key: str
    pixels: Float[Tensor, "f c h w"]
    caption: str | None
    label: int | None


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        packs: packs rank, rank+world, … of the global batch.
        global_samples: samples of the whole global batch, over all ranks.
        state_after: where the stream stands after it; what a checkpoint keeps.
        bad: distinct bad samples this rank has met since the loader was made; summed over ranks, all that were met.
    """

    packs: list[list[Sample]]
    global_samples: int
    state_after: DataState
    bad: int


class Loader:
    """Iterates without end over this rank's share of the global batches, from `state` on.

    A sample that fails its CRC or does not decode is replaced by one that is no longer, drawn by (seed, bad id,
    epoch): the same on every rerun and on whichever rank meets it. It is written to the ledger (a JSON line with shard,
    key, reason, sample_id, epoch) when it is first met. The run stops once more distinct samples are bad than
    `bad_budget` allows for the samples this rank has seen.

    Args:
        index: the data set.
        plan: made for it; its `global_batch_packs` must be a multiple of `world`.
        rank, world: data-parallel rank and size.
        channels, multiple: see `decode`.
        workers: processes that decode ahead, each up to two packs; 0 decodes in this process. The samples are the same.
        bad_samples: share of bad samples above which the run stops.
        state: where to start; the beginning if None.
        ledger_path: file the ledger is appended to; ranks need a file each. None keeps none.
        seed: seed of the run; chooses replacements.

    Raises:
        ValueError: `world` does not divide the packs, the state belongs to another data set, or sizes out of range;
            while iterating, a shard that cannot be read or too many bad samples.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        *,
        rank: int,
        world: int,
        channels: int,
        multiple: int,
        workers: int = 0,
        bad_samples: float = 0.01,
        state: DataState | None = None,
        ledger_path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"data-parallel rank {rank} does not lie in a world of {world}")
        if plan.global_batch_packs % world:
            raise ValueError(_does_not_divide(plan.global_batch_packs, world))
        if workers < 0 or not 0 <= bad_samples <= 1:
            raise ValueError(
                f"data.workers={workers} must be at least 0 and data.bad_samples={bad_samples} lie between 0 and 1"
            )
        if len(plan) != len(index):
            raise ValueError(f"the plan was made for {len(plan)} samples, the data set has {len(index)}")
        state = state or DataState.start(index.hash)
        if state.index_hash != index.hash:
            raise ValueError(
                f"the data set has changed: the run stands in data {state.index_hash[:12]}, data.shards now names "
                f"{index.hash[:12]}; name the same shards, or start a new run"
            )
        self.state = state
        """Where the next batch starts."""
        self._index, self._plan, self._rank, self._world, self._seed = index, plan, rank, world, seed
        self._decoder = PackDecoder(index.reader, channels, multiple)
        heights, widths = cropped_size(index.heights, index.widths, multiple)
        self._sizes = torch.from_numpy(heights), torch.from_numpy(widths)
        self._workers, self._share = workers, bad_samples
        self._ledger = Path(ledger_path) if ledger_path is not None else None
        self._seen = 0
        self._bad: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        planned: list[tuple[list[Pack], int, DataState]] = []
        mine = self._plan.global_batch_packs // self._world

        def upcoming() -> Iterator[list[int]]:
            state = self.state
            while True:
                packs, state = self._plan.batch(state)
                planned.append((packs[self._rank :: self._world], sum(map(len, packs)), state))
                for pack in planned[-1][0]:
                    yield [sample.sample_id for sample in pack]

        decoded = decoded_in_order(self._decoder, upcoming(), self._workers)
        try:
            while True:
                raw_packs = [next(decoded) for _ in range(mine)]
                packs, global_samples, state_after = planned.pop(0)
                samples = [
                    [self._sample(place, raw) for place, raw in zip(pack, raw_pack, strict=True)]
                    for pack, raw_pack in zip(packs, raw_packs, strict=True)
                ]
                self.state = state_after
                yield Batch(samples, global_samples, state_after, len(self._bad))
        finally:
            decoded.close()

    def _sample(self, place: PlannedSample, raw: RawSample | str) -> Sample:
        """The sample planned at `place`, or what stands in for it."""
        sample = self._checked(place, raw)
        if sample is not None:
            return sample
        tokens = self._plan.tokens
        allowed = self._plan.usable & (tokens <= tokens[place.sample_id])
        allowed[place.sample_id] = False
        for candidate in replacement_candidates(
            self._seed, place.sample_id, place.epoch, allowed.nonzero()[0]
        ).tolist():
            # One plus the bad id: two bad samples of an epoch may draw one stand-in, and its noise must differ.
            stand_in = PlannedSample(candidate, place.epoch, place.occurrence + 1 + place.sample_id)
            sample = self._checked(stand_in, self._decoder([candidate])[0])
            if sample is not None:
                return sample
        raise ValueError(
            f"{self._index.name(place.sample_id)} cannot be read and no sample of at most "
            f"{tokens[place.sample_id]} tokens can stand in for it"
        )

    def _checked(self, place: PlannedSample, raw: RawSample | str) -> Sample | None:
        self._seen += 1
        if isinstance(raw, str):
            self._count_bad(place, raw)
            return None
        height, width = (int(side[place.sample_id]) for side in self._sizes)
        if raw.pixels.shape[2:] != (height, width):
            self._count_bad(
                place, f"picture decodes to {raw.pixels.shape[2:]} pixels, the index says {(height, width)}"
            )
            return None
        key = self._index.key(place.sample_id)
        pixels = torch.from_numpy(raw.pixels)
        return Sample(place.sample_id, place.epoch, place.occurrence, key, pixels, raw.caption, raw.label)

    def _count_bad(self, place: PlannedSample, reason: str) -> None:
        if place.sample_id in self._bad:
            return
        self._bad.add(place.sample_id)
        shard, key = self._index.reader.locate(place.sample_id)
        if self._ledger is not None:
            line = {
                "shard": str(shard),
                "key": key,
                "reason": reason,
                "sample_id": place.sample_id,
                "epoch": place.epoch,
            }
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        seen = min(self._seen, len(self._index))
        if len(self._bad) > bad_budget(self._share, seen, len(self._index)):
            raise ValueError(
                f"{len(self._bad)} of {seen} samples read are bad, more than data.bad_samples={self._share} allows; "
                f"the last is sample {key} of shard {shard}: {reason}"
            )


def bad_budget(share: float, seen: int, size: int) -> int:
    """How many distinct bad samples are tolerated among `seen` samples drawn from a data set of `size`.

    ⌈share·seen + 4·sqrt(share·seen·(1 - seen/size))⌉: the budget itself once all is seen, and before that four standard
    deviations more, so that chance alone does not stop a run whose share is within the budget, nor one bad
    sample a small run; at 1%, a fifth of bad samples stops it within about fifteen. A share of 0 tolerates none.
    """
    expected = share * seen
    return math.ceil(expected + 4 * math.sqrt(expected * (1 - seen / size)) - 1e-9)


def _does_not_divide(packs: int, world: int) -> str:
    below, above = packs // world * world, (packs // world + 1) * world
    nearest = below if below and packs - below <= above - packs else above
    return (
        f"train.global_batch_packs={packs} cannot be shared evenly by a data-parallel size of {world}; "
        f"the nearest that can is {nearest}"
    )


__all__ = ["BadSampleError", "Batch", "Loader", "Sample", "bad_budget"]
