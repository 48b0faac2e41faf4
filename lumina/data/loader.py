"""The loader: this rank's packs of each global batch, decoded ahead, bad samples replaced, counted and bounded."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lumina.data.decode import BadSampleError, pixels_of
from lumina.data.index import Index
from lumina.data.order import permutation, random_words, replacement_rows
from lumina.data.plan import DataState, Pack, Plan, PlannedSample
from lumina.data.sizing import LATENT, Sizing
from lumina.data.workers import PackDecoder, RawSample, Request, decoded_in_order


@dataclass
class Sample:
    """A decoded sample: `pixels` (frames, channels, height, width) float32 in [-1, 1], or `latent`.

    (sample_id, epoch, occurrence) names this place in the stream; occurrence is above 0 for a replacement.

    latent: mean and deviation of the autoencoder's posterior, where `lumina data encode` made it beforehand.
    text, null_text: features of the caption and of the empty one, where they were made beforehand.
    encoders: what made them, in words: "vae" and "text".
    """

    sample_id: int
    epoch: int
    occurrence: int
    key: str
    pixels: Float[Tensor, "f c h w"] | None
    caption: str | None
    label: int | None
    latent: Float[Tensor, "f c2 rows columns"] | None = None
    text: Float[Tensor, "l width"] | None = None
    null_text: Float[Tensor, "k width"] | None = None
    encoders: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        packs: packs rank, rank+world, … of the global batch; none of a batch that was passed over.
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

    A sample that fails its CRC or does not decode is replaced by one of its set that is no longer, out of its own shard
    if that has one, drawn by (seed, bad id, epoch): the same on every rerun and on whichever rank meets it. It is
    written to the ledger (a JSON line with shard, key, reason, sample_id, epoch) when it is first met. The run stops
    once more distinct samples are bad than `bad_budget` allows for the samples this rank has seen.

    Args:
        index: the data sets.
        plan: made for it; its `global_batch_packs` must be a multiple of `world`.
        sizing: what size each sample is read at.
        rank, world: data-parallel rank and size.
        channels: of the pixels, 1 (grey) or 3 (RGB).
        workers: processes that decode ahead, each up to two packs; 0 decodes in this process. The samples are the same.
        bad_samples: share of bad samples above which the run stops.
        state: where to start; the beginning if None.
        step: optimizer steps already done; the stage of `sizing` follows from it.
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
        sizing: Sizing,
        *,
        rank: int,
        world: int,
        channels: int,
        workers: int = 0,
        bad_samples: float = 0.01,
        state: DataState | None = None,
        step: int = 0,
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
        state = state or plan.start(index.hash)
        if state.index_hash != index.hash:
            raise ValueError(
                f"the data set has changed: the run stands in data {state.index_hash[:12]}, data.shards now names "
                f"{index.hash[:12]}; name the same shards, or start a new run"
            )
        self.state = state
        """Where the next batch starts."""
        self.step = step
        """Steps before it."""
        self._index, self._plan, self._sizing = index, plan, sizing
        self._rank, self._world, self._seed = rank, world, seed
        self._decoder = PackDecoder(index.reader, channels)
        self._workers, self._share = workers, bad_samples
        self._ledger = Path(ledger_path) if ledger_path is not None else None
        self._seen = 0
        self._bad: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        planned: list[tuple[list[Pack], int, DataState]] = []
        mine = self._plan.global_batch_packs // self._world

        def upcoming() -> Iterator[list[Request]]:
            state, step = self.state, self.step
            while True:
                step += 1
                packs, state = self._plan.batch(state, step)
                planned.append((packs[self._rank :: self._world], sum(map(len, packs)), state))
                for pack in planned[-1][0]:
                    yield self._requests(pack, step)

        decoded = decoded_in_order(self._decoder, upcoming(), self._workers)
        try:
            while True:
                raw_packs = [next(decoded) for _ in range(mine)]
                packs, global_samples, state_after = planned.pop(0)
                samples = [
                    [self._sample(place, raw) for place, raw in zip(pack, raw_pack, strict=True)]
                    for pack, raw_pack in zip(packs, raw_packs, strict=True)
                ]
                self.state, self.step = state_after, self.step + 1
                yield Batch(samples, global_samples, state_after, len(self._bad))
        finally:
            decoded.close()

    def pass_over(self) -> Batch:
        """The next batch without its samples: they are neither read nor replaced. Not while this is iterated."""
        self.step += 1
        _, self.state = self._plan.batch(self.state, self.step)
        return Batch([], 0, self.state, len(self._bad))

    def _requests(self, pack: Pack, step: int) -> list[Request]:
        stage = self._sizing.stage_of(step)
        shapes = self._index.shapes(np.array([place.sample_id for place in pack], np.int64))
        sizes = np.stack(self._sizing.sizes(shapes, stage), -1).tolist()
        requests = []
        for place, size, kind in zip(pack, sizes, shapes.kind.tolist(), strict=True):
            usable = size[0] > 0
            view = self._sizing.view(place, tuple(size), stage) if usable and kind != LATENT else None
            requests.append(Request(place.sample_id, view, self._sizing.crop(place), usable))
        return requests

    def _sample(self, place: PlannedSample, raw: RawSample | str) -> Sample:
        """The sample planned at `place`, or what stands in for it."""
        sample = self._checked(place, raw)
        if sample is not None:
            return sample
        for candidate in self._replacements(place):
            # One plus the bad id: two bad samples of an epoch may draw one stand-in, and its noise must differ.
            stand_in = PlannedSample(candidate, place.epoch, place.occurrence + 1 + place.sample_id)
            (request,) = self._requests((stand_in,), self.step + 1)
            sample = self._checked(stand_in, self._decoder([request])[0])
            if sample is not None:
                return sample
        raise ValueError(
            f"{self._index.name(place.sample_id)} cannot be read and no sample that is as short can stand in for it"
        )

    def _replacements(self, place: PlannedSample) -> Iterator[int]:
        """Ids of usable samples no longer than the one planned at `place`: of its shard, its set, then other sets."""
        step, starts = self.step + 1, self._index.reader.starts
        longest = self._plan.tokens_of(np.array([place.sample_id]), step)[0]
        own = self._index.reader.place(place.sample_id)[0]
        for shard in (own, *self._other_shards(place.sample_id, own)):
            first, stop = starts[shard : shard + 2].tolist()
            ids = np.arange(first, stop)
            usable = self._sizing.sizes(self._index.shapes(ids), self._sizing.stage_of(step))[0] > 0
            usable &= (self._plan.tokens_of(ids, step) <= longest) & (ids != place.sample_id)
            # Not past those known to be bad: of a video one clip may decode and another not, and what a rank knows
            # depends on what it has read. Few of each shard, as a shard may be bad as a whole.
            rows = replacement_rows(self._seed, place.sample_id, place.epoch, usable.nonzero()[0], count=16)
            for row in rows.tolist():
                yield first + row

    def _other_shards(self, bad_id: int, own: int) -> Iterator[int]:
        """Up to a hundred other shards of a bad sample's set, then of other sets, where its own has none as short."""
        edges = np.cumsum([0, *(len(starts) - 1 for starts in self._index.starts)])
        shards = permutation(random_words(int(edges[-1]), "replacement shards", self._seed, bad_id))
        in_set = np.digitize(shards, edges) == np.digitize(own, edges)
        for group in (shards[in_set & (shards != own)], shards[~in_set]):
            yield from group[:100].tolist()

    def _checked(self, place: PlannedSample, raw: RawSample | str) -> Sample | None:
        self._seen += 1
        if isinstance(raw, str):
            self._count_bad(place, raw)
            return None
        pixels = None if raw.levels is None else pixels_of(raw.levels)
        latent, text, null = (None if x is None else torch.from_numpy(x) for x in (raw.latent, raw.text, raw.null_text))
        key, made = self._index.key(place.sample_id), (latent, text, null, raw.encoders)
        return Sample(place.sample_id, place.epoch, place.occurrence, key, pixels, raw.caption, raw.label, *made)

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
