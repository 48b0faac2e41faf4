"""The packs of each step, for all ranks of a replica: one reads, decodes and encodes, the others are sent it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.data.loader import Batch, Loader
from lumina.data.plan import DataState
from lumina.model.tokens import Captions
from lumina.parallel.mesh import Mesh
from lumina.train.prepare import Encoded, Preparer, TrainingPack


@dataclass(frozen=True)
class StepData:
    """This rank's part of a global batch; of one passed over, nothing. The leader of a replica knows `state_after`."""

    packs: list[TrainingPack]
    global_samples: int
    epoch: int
    bad: int
    state_after: DataState | None


@dataclass(frozen=True)
class _Outline:
    """What the others must know before tensors can be sent; or why there are none."""

    packs: list["_PackOutline"]
    global_samples: int = 0
    epoch: int = 0
    bad: int = 0
    failure: str | None = None
    by_user: bool = False


@dataclass(frozen=True)
class _PackOutline:
    identities: tuple
    shapes: list[tuple[int, ...]]
    caption_lengths: tuple[int, ...] | None
    caption_width: int
    labels: list[int] | None
    channels: tuple[int, ...] | None


class Feed:
    """Iterates over the steps' data.

    Args:
        loader: of this replica, which the leader alone iterates.
        packs_per_forward: so many of the loader's packs become one of a forward pass.
    """

    def __init__(self, loader: Loader, preparer: Preparer, mesh: Mesh, packs_per_forward: int):
        self._loader, self._preparer, self._mesh = loader, preparer, mesh
        self._at_once = packs_per_forward

    def __iter__(self) -> Iterator[StepData]:
        """
        Raises:
            ValueError: what the loader or the preparation refuse, on every rank of the replica.
        """
        batches = iter(self._loader) if self._mesh.leads_replica else None
        while True:
            batch, encoded, outline = None, [], None
            if batches is not None:
                batch, encoded, outline = self._read(batches)
            outline = self._mesh.from_leader(outline)
            if outline.failure is not None:
                kind = ValueError if outline.by_user else RuntimeError
                raise kind(f"rank {self._mesh.replica.ranks[0]}, which reads for this one: {outline.failure}")
            packs = [
                self._preparer.pack(self._sent(encoded[i] if encoded else None, pack))
                for i, pack in enumerate(outline.packs)
            ]
            state = batch.state_after if batch is not None else None
            yield StepData(packs, outline.global_samples, outline.epoch, outline.bad, state)

    def pass_over(self) -> StepData:
        """The next step's data, without any: its samples are not read. Not while this is iterated."""
        if not self._mesh.leads_replica:
            return StepData([], 0, 0, 0, None)
        batch = self._loader.pass_over()
        return StepData([], 0, batch.state_after.epoch, batch.bad, batch.state_after)

    def _read(self, batches: Iterator[Batch]) -> tuple[Batch, list[Encoded], _Outline]:
        try:
            batch = next(batches)
            at_once = range(0, len(batch.packs), self._at_once)
            together = [batch.packs[first : first + self._at_once] for first in at_once]
            encoded = [self._preparer.encode([sample for pack in packs for sample in pack]) for packs in together]
        except Exception as error:
            # The others wait for this rank: they are told before it ends.
            self._mesh.from_leader(_Outline([], failure=str(error), by_user=isinstance(error, ValueError)))
            raise
        epoch = batch.state_after.epoch
        return batch, encoded, _Outline([_outline(e) for e in encoded], batch.global_samples, epoch, batch.bad)

    def _sent(self, encoded: Encoded | None, outline: _PackOutline) -> Encoded:
        if self._mesh.replica.size == 1:
            return encoded
        device = self._mesh.device
        sizes = [torch.Size(shape).numel() for shape in outline.shapes]
        flat = None if encoded is None else torch.cat([latent.reshape(-1) for latent in encoded.latents])
        flat = self._mesh.tensor_from_leader(flat, (sum(sizes),), torch.float32)
        latents = [part.view(shape) for part, shape in zip(flat.split(sizes), outline.shapes, strict=True)]
        captions = labels = None
        if outline.caption_lengths is not None:
            features: Tensor | None = None if encoded is None else encoded.captions.features
            shape = (sum(outline.caption_lengths), outline.caption_width)
            features = self._mesh.tensor_from_leader(features, shape, torch.float32)
            captions = Captions.of(features, outline.caption_lengths)
        if outline.labels is not None:
            labels = torch.tensor(outline.labels, device=device)
        return Encoded(outline.identities, latents, captions, labels, outline.channels)


def _outline(encoded: Encoded) -> _PackOutline:
    captions, labels = encoded.captions, encoded.labels
    return _PackOutline(
        encoded.identities,
        [tuple(latent.shape) for latent in encoded.latents],
        None if captions is None else captions.lengths,
        0 if captions is None else captions.features.shape[1],
        None if labels is None else labels.tolist(),
        encoded.channels,
    )
