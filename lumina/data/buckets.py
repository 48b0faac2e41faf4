"""Aspect buckets: the shapes, in patches, to which pictures of any size are brought at one resolution."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(64)
def buckets(resolution_patches: int, max_ratio: float = 4.0) -> tuple[tuple[int, int], ...]:
    """The (height, width) in patches that a resolution allows, wide to tall.

    None has more than resolution_patches² patches, nor room for a row and a column more, and none is more than
    `max_ratio` times longer than wide or the other way round. 256, 512 and 1024 pixels with patches of 16 pixels
    (resolution_patches 16, 32 and 64) give the 49, 97 and 193 buckets of the public Lumina-T2X recipe.

    Args:
        resolution_patches: side of the square bucket, in patches (VAE factor × patch size pixels each).
        max_ratio: of the longer to the shorter side, ≥ 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if resolution_patches < 1:
        raise ValueError(f"resolution_patches must be at least 1, not {resolution_patches}")
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio is longer side / shorter side and at least 1, not {max_ratio}")
    patches = resolution_patches**2
    height, width = 1, patches
    found = []
    while width > 0:
        if max(height, width) <= max_ratio * min(height, width):
            found.append((height, width))
        if (height + 1) * width <= patches:
            height += 1
        else:
            width -= 1
    return tuple(found)


@lru_cache(64)
def _by_aspect(buckets: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the buckets that are the largest, then the first, of their aspect, and their aspects, ascending."""
    # Equal fractions give equal quotients in floating point, and unequal ones of sides below ten million different
    # ones, so that ties are seen exactly.
    order = sorted(range(len(buckets)), key=lambda i: (buckets[i][1] / buckets[i][0], -_area(buckets[i]), i))
    aspects = np.array([buckets[i][1] / buckets[i][0] for i in order])
    first = np.concatenate([[True], aspects[1:] != aspects[:-1]])
    return np.array(order)[first], aspects[first]


def nearest_bucket(height: np.ndarray | int, width: np.ndarray | int, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Index of the bucket that shows most of a picture.

    A picture is scaled until it covers the bucket, and what stands over is cut off. Of a picture of aspect a (width /
    height) a bucket of aspect b then shows the share min(a/b, b/a); the bucket with the largest share is taken, of
    equal ones that with more patches, and of those the first.

    Args:
        height: pixels, a number or an array of whole numbers.
        width: pixels, of the same shape.
        buckets: (height, width) of each, in patches.

    Returns:
        int64 of the same shape; -1 where height or width is 0 (unknown).

    Raises:
        ValueError: there are no buckets, a side of one is below 1, a size is negative, or the shapes differ.
    """
    height, width = np.asarray(height, dtype=np.int64), np.asarray(width, dtype=np.int64)
    if height.shape != width.shape:
        raise ValueError(f"heights of shape {height.shape} and widths of shape {width.shape} do not belong together")
    if (height < 0).any() or (width < 0).any():
        raise ValueError("heights and widths are pixels and cannot be negative")
    if not buckets or min(map(min, buckets)) < 1:
        raise ValueError(f"buckets are (height, width) of at least one patch a side, and at least one; not {buckets}")

    chosen, aspects = _by_aspect(tuple(map(tuple, buckets)))
    rows, columns = np.array(buckets, dtype=np.int64)[chosen].T

    known = (height > 0) & (width > 0)
    tall, wide = np.where(known, height, 1), np.where(known, width, 1)
    # The share falls off to both sides of the picture's own aspect: only its two neighbours can be best.
    right = np.minimum(np.searchsorted(aspects, wide / tall), len(aspects) - 1)
    left = np.maximum(right - 1, 0)
    share_left, share_right = (_share(tall, wide, rows[side], columns[side]) for side in (left, right))
    area = rows * columns
    better = (share_left > share_right) | (
        (share_left == share_right)
        & ((area[left] > area[right]) | ((area[left] == area[right]) & (chosen[left] < chosen[right])))
    )
    return np.where(known, chosen[np.where(better, left, right)], -1).astype(np.int64, copy=False)


def _share(height: Any, width: Any, rows: Any, columns: Any) -> Any:
    # One division of whole numbers, which is correctly rounded; a quotient of quotients would not be.
    one, other = height * columns, width * rows
    return np.minimum(one, other) / np.maximum(one, other)


def _area(bucket: tuple[int, int]) -> int:
    return bucket[0] * bucket[1]
