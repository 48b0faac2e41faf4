"""Planning: the endless sample stream cut into packs and global batches, the same under any number of ranks."""

import bisect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PlannedSample:
    """One place in the stream. (sample_id, epoch, occurrence) names it once; all randomness is drawn from it."""

    sample_id: int
    epoch: int
    occurrence: int = 0


Pack = tuple[PlannedSample, ...]


@dataclass(frozen=True)
class DataState:
    """Where the stream stands: the next sample is number `offset` of epoch `epoch`.

    `packs` counts the packs handed out so far over all ranks; `index_hash` names the data set. Nothing in it
    depends on the number of ranks or workers, so a run goes on from it under any layout.
    """

    epoch: int
    offset: int
    packs: int
    index_hash: str

    @classmethod
    def start(cls, index_hash: str) -> "DataState":
        """The beginning of the stream over the data set `index_hash`."""
        return cls(epoch=0, offset=0, packs=0, index_hash=index_hash)

    def to_dict(self) -> dict[str, int | str]:
        """JSON-ready form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DataState":
        """The state written by `to_dict`; `ValueError` on a missing or unknown key, a wrong type or a bad hash."""
        expected = [field.name for field in fields(cls)]
        if sorted(data) != sorted(expected):
            raise ValueError(f"a data state has the keys {expected}, not {sorted(data)}")
        for name in ("epoch", "offset", "packs"):
            value = data[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} of a data state must be a whole number of at least 0, not {value!r}")
        if not isinstance(data["index_hash"], str) or not re.fullmatch("[0-9a-f]{64}", data["index_hash"]):
            raise ValueError(f"index_hash of a data state must be 64 hex digits, not {data['index_hash']!r}")
        return cls(**data)


class Plan:
    """Greedy next-fit packing of epoch 0, 1, 2, … into packs of at most `tokens_per_pack` tokens.

    A pack takes samples in stream order until the next would not fit, across the end of an epoch too. What is
    held does not grow with the steps: one length a sample, and order and running length of two epochs.

    Args:
        order_fn: epoch → int array (N,) of sample ids, a permutation of 0 … N-1 (see `order.epoch_order`).
        tokens_of: int64 ids (N,) → int array (N,) of their lengths in tokens; 0 marks a sample that cannot be used
            (its size is unknown, or less than one patch). Such a sample keeps its place, planned at the median length
            of the others; the loader finds it bad and puts another in.
        tokens_per_pack: upper bound of a pack's tokens.
        global_batch_packs: packs of one optimizer step, over all ranks.
        name_of: sample id → what to call it in errors.

    Raises:
        ValueError: a sample longer than a pack (all are looked at, the longest is named), no usable sample at
            all, or sizes below 1.
    """

    def __init__(
        self,
        order_fn: Callable[[int], np.ndarray],
        tokens_of: Callable[[np.ndarray], np.ndarray],
        tokens_per_pack: int,
        global_batch_packs: int,
        name_of: Callable[[int], str] | None = None,
    ) -> None:
        for name, value in (("tokens_per_pack", tokens_per_pack), ("global_batch_packs", global_batch_packs)):
            if value < 1:
                raise ValueError(f"train.{name} must be at least 1, not {value}")
        self.tokens_per_pack = tokens_per_pack
        self.global_batch_packs = global_batch_packs
        self._order_fn = order_fn
        order = np.asarray(order_fn(0))
        size = len(order)
        if size == 0:
            raise ValueError("there is nothing to plan: the data set holds no samples")
        lengths = np.asarray(tokens_of(np.arange(size, dtype=np.int64)))
        if lengths.shape != (size,) or not np.issubdtype(lengths.dtype, np.integer) or lengths.min() < 0:
            raise ValueError(
                f"tokens_of must give one whole number of at least 0 for each of the {size} samples, "
                f"not {lengths.dtype} of shape {lengths.shape}"
            )
        self.usable = lengths > 0
        if not self.usable.any():
            raise ValueError(f"none of the {size} samples can be used: each is unreadable or smaller than one patch")
        longest = int(lengths.argmax())
        if lengths[longest] > tokens_per_pack:
            name = name_of(longest) if name_of else f"sample {longest}"
            raise ValueError(
                f"{name} has {lengths[longest]} tokens and {int((lengths > tokens_per_pack).sum())} of {size} samples "
                f"do not fit in train.tokens_per_pack={tokens_per_pack}; "
                f"set it to at least {lengths[longest]}, or leave them out"
            )
        usable_lengths = lengths[self.usable]
        middle = len(usable_lengths) // 2
        # int32: at ten million samples this array is what planning costs in memory.
        self.tokens = np.where(self.usable, lengths, np.partition(usable_lengths, middle)[middle]).astype(np.int32)
        self._orders = {0: (order, np.cumsum(self.tokens[order], dtype=np.int64))}

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.tokens)

    def batch(self, state: DataState) -> tuple[list[Pack], DataState]:
        """The packs of the global batch that starts at `state`, and the state after it.

        Raises:
            ValueError: the state points past the end of an epoch, so it belongs to other data.
        """
        if state.offset > len(self):
            raise ValueError(
                f"the data state stands at sample {state.offset} of its epoch, but an epoch has {len(self)} samples"
            )
        packs, epoch, offset = [], state.epoch, state.offset
        for _ in range(self.global_batch_packs):
            pack, epoch, offset = self._pack(epoch, offset)
            packs.append(pack)
        return packs, DataState(epoch, offset, state.packs + len(packs), state.index_hash)

    def waste(self, state: DataState, batches: int = 100) -> float:
        """Share of the room in packs left unused over the next `batches` global batches, in [0, 1)."""
        if batches < 1:
            raise ValueError(f"waste is measured over at least 1 batch, not {batches}")
        used = 0
        for _ in range(batches):
            packs, state = self.batch(state)
            used += sum(int(self.tokens[sample.sample_id]) for pack in packs for sample in pack)
        return 1 - used / (batches * self.global_batch_packs * self.tokens_per_pack)

    def _pack(self, epoch: int, offset: int) -> tuple[Pack, int, int]:
        room = self.tokens_per_pack
        pack: list[PlannedSample] = []
        while True:
            order, ends = self._epoch(epoch)
            used = int(ends[offset - 1]) if offset else 0
            stop = bisect.bisect_right(ends, used + room, lo=offset)
            pack += [PlannedSample(int(sample_id), epoch) for sample_id in order[offset:stop]]
            if stop < len(order):
                return tuple(pack), epoch, stop
            room -= int(ends[-1]) - used
            epoch, offset = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._orders:
            order = np.asarray(self._order_fn(epoch))
            if order.shape != (len(self),):
                raise ValueError(f"the order of epoch {epoch} has {order.shape} ids, that of epoch 0 had {len(self)}")
            if len(self._orders) > 1:
                # A pack reaches from one epoch into the next, then never back.
                del self._orders[min(self._orders)]
            self._orders[epoch] = order, np.cumsum(self.tokens[order], dtype=np.int64)
        return self._orders[epoch]
