"""The order of the sample stream: a pure function of (seed, epoch, number of samples), the same on every machine."""

import hashlib

import numpy as np


def epoch_order(seed: int, epoch: int, index_size: int) -> np.ndarray:
    """Permutation of the sample ids 0 … index_size-1 for one epoch.

    Args:
        seed: seed of the run, ≥ 0.
        epoch: number of the pass over the data, ≥ 0.
        index_size: how many samples the data set holds, ≥ 1.

    Returns:
        int64 array (index_size,): position in the epoch → sample id, each id once.

    Raises:
        ValueError: an argument out of its range.
    """
    for name, value, least in (("seed", seed, 0), ("epoch", epoch, 0), ("index_size", index_size, 1)):
        if value < least:
            raise ValueError(f"{name} of an epoch's order must be at least {least}, not {value}")
    return permutation(random_words(index_size, "order", seed, epoch))


def random_words(count: int, purpose: str, *key: int) -> np.ndarray:
    """`count` uint64 words of the Philox stream that belongs to (purpose, key)."""
    # Only the raw words of a numpy bit generator are promised to stay the same in later versions;
    # Generator.permutation is not, and a resumed run must find the order it left.
    digest = hashlib.blake2b(f"{purpose}:{':'.join(map(str, key))}".encode(), digest_size=16, person=b"lumina.data")
    return np.random.Philox(key=int.from_bytes(digest.digest(), "little")).random_raw(count)


def permutation(words: np.ndarray) -> np.ndarray:
    """The ranks of random words: int64 (n,), a permutation; equal words keep their order."""
    return np.argsort(words, kind="stable").astype(np.int64)


def replacement_candidates(seed: int, bad_id: int, epoch: int, allowed: np.ndarray, count: int = 100) -> np.ndarray:
    """Which samples stand in, first choice first, for one that cannot be read.

    Args:
        seed: seed of the run.
        bad_id: the sample to be replaced.
        epoch: epoch in which it was planned.
        allowed: int64 (m,) sample ids to draw from.
        count: at most so many candidates.

    Returns:
        int64 (≤ count,): distinct ids out of `allowed`.
    """
    if len(allowed) <= 4 * count:
        return allowed[permutation(random_words(len(allowed), "replacement", seed, bad_id, epoch))][:count]
    # Sorting millions of ids for one bad sample would cost a second; four times as many draws as are
    # needed leave enough distinct ones.
    drawn = random_words(4 * count, "replacement", seed, bad_id, epoch) % np.uint64(len(allowed))
    _, first = np.unique(drawn, return_index=True)
    return allowed[drawn[np.sort(first)].astype(np.int64)][:count]
