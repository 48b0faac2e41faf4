"""The order of the samples: a pure function of (seed, epoch, index), the same on every machine.

A data set's shards are cut into *pieces* of consecutive samples. Each epoch deals the pieces, permuted, to *lanes* in
turn; a lane reads its pieces one after another, shuffled within windows. So a lane reads a share of the shards alone.
"""

import hashlib
import math
from collections import OrderedDict

import numpy as np

PIECES_PER_LANE = 4
"""With fewer shards than so many a lane, shards are cut."""


def random_words(count: int, purpose: str, *key: int) -> np.ndarray:
    """`count` uint64 words of the Philox stream that belongs to (purpose, key)."""
    # Only the raw words of a numpy bit generator are promised to stay the same in later versions;
    # Generator.permutation is not, and a resumed run must find the order it left.
    digest = hashlib.blake2b(f"{purpose}:{':'.join(map(str, key))}".encode(), digest_size=16, person=b"lumina.data")
    return np.random.Philox(key=int.from_bytes(digest.digest(), "little")).random_raw(count)


def permutation(words: np.ndarray) -> np.ndarray:
    """The ranks of random words: int64 (n,), a permutation; equal words keep their order."""
    return np.argsort(words, kind="stable").astype(np.int64)


class SetOrder:
    """The order of one data set's samples, for each of `lanes` lanes.

    Args:
        starts: int64 (shards + 1,), id of the first sample of each shard, and the id after the last.
        lanes: how many share the set, ≥ 1.
        window: samples of a lane that are shuffled among themselves, ≥ 1; 1 shuffles pieces alone.
        seed: of the run.
        number: of the set, where several are blended.
    """

    def __init__(self, starts: np.ndarray, lanes: int, window: int, seed: int, number: int = 0):
        self.lanes, self.window, self._key = lanes, window, (seed, number)
        sizes = np.diff(starts)
        each = max(1, math.ceil(PIECES_PER_LANE * lanes / len(sizes)))
        edges = sizes[:, None] * np.arange(each + 1) // each
        lengths = np.diff(edges, axis=1).ravel()
        firsts = (starts[:-1, None] + edges[:, :-1]).ravel()
        self._firsts, self._lengths = firsts[lengths > 0], lengths[lengths > 0]
        self._deals: OrderedDict[int, np.ndarray] = OrderedDict()

    def pieces(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """First ids and lengths, int64 (pieces,) each, of what a lane reads in an epoch, in its order; maybe none."""
        if epoch not in self._deals:
            self._deals[epoch] = permutation(random_words(len(self._firsts), "pieces", *self._key, epoch))
            if len(self._deals) > 4:  # lanes are within an epoch or two of each other
                self._deals.popitem(last=False)
        self._deals.move_to_end(epoch)
        # Dealing goes on where the epoch before stopped, so that over epochs all lanes get as many.
        mine = self._deals[epoch][(lane - epoch * len(self._firsts)) % self.lanes :: self.lanes]
        return self._firsts[mine], self._lengths[mine]

    def count(self, epoch: int, lane: int) -> int:
        """Samples that a lane reads in an epoch."""
        return int(self.pieces(epoch, lane)[1].sum())

    def samples(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Ids, int64, of the samples of a lane's window, in order; empty past its last."""
        firsts, lengths = self.pieces(epoch, lane)
        ends = np.cumsum(lengths)
        low, high = window * self.window, (window + 1) * self.window
        ids = [
            np.arange(max(low, end - length), min(high, end)) - (end - length) + first
            for first, length, end in zip(firsts, lengths, ends, strict=True)
            if end > low and end - length < high
        ]
        if not ids:
            return np.empty(0, np.int64)
        ids = np.concatenate(ids)
        return ids[permutation(random_words(len(ids), "window", *self._key, epoch, lane, window))]


def replacement_rows(seed: int, bad_id: int, epoch: int, allowed: np.ndarray, count: int = 100) -> np.ndarray:
    """Which rows of a shard stand in, first choice first, for a sample that cannot be read.

    Args:
        seed: seed of the run.
        bad_id: the sample to be replaced.
        epoch: epoch in which it was planned.
        allowed: int64 (m,) rows to draw from.
        count: at most so many.

    Returns:
        int64 (≤ count,): distinct rows out of `allowed`.
    """
    return allowed[permutation(random_words(len(allowed), "replacement", seed, bad_id, epoch))][:count]
