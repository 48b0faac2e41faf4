"""Buckets against the public recipe's counts and against their definition; the choice against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from lumina.data.buckets import buckets, nearest_bucket


@pytest.mark.parametrize(("resolution", "count", "tokens"), [(16, 49, 288), (32, 97, 1088), (64, 193, 4224)])
def test_the_public_recipe(resolution: int, count: int, tokens: int) -> None:
    found = buckets(resolution)
    assert len(set(found)) == len(found) == count
    assert max(height * width + height for height, width in found) == tokens
    assert (resolution, resolution) in found


@pytest.mark.parametrize(("resolution", "ratio"), [(1, 4.0), (3, 1.0), (7, 2.5), (16, 4.0)])
def test_the_definition(resolution: int, ratio: float) -> None:
    """All maximal rectangles under the hyperbola, and what the recipe's staircase passes between them."""
    limit = resolution**2
    sides = range(1, limit + 1)
    fits = {(h, w) for h in sides for w in sides if h * w <= limit and max(h, w) <= ratio * min(h, w)}
    # The staircase runs along the boundary: from each of its shapes neither a row and a column can be added.
    border = {(h, w) for h, w in fits if (h + 1) * (w + 1) > limit}
    found = buckets(resolution, ratio)
    assert set(found) <= border
    assert {(h, w) for h, w in border if (h + 1) * w > limit and h * (w + 1) > limit} <= set(found)
    assert list(found) == sorted(found, key=lambda bucket: (bucket[0], -bucket[1]))


def best(height: int, width: int, shapes: list[tuple[int, int]]) -> int:
    def rank(i: int) -> tuple:
        share = Fraction(width, height) / Fraction(shapes[i][1], shapes[i][0])
        return min(share, 1 / share), shapes[i][0] * shapes[i][1], -i

    return max(range(len(shapes)), key=rank)


@pytest.mark.parametrize("shapes", [buckets(16), buckets(5, 3.0)[::-1], ((1, 1), (2, 2), (1, 2), (2, 1), (2, 2))])
def test_the_nearest_by_exact_fractions(shapes: tuple) -> None:
    generator = np.random.default_rng(0)
    heights, widths = generator.integers(1, 3000, (2, 400))
    # Sizes that are multiples of a bucket, and between two: the ties.
    heights[:100] = generator.integers(1, 12, 100)
    widths[:100] = generator.integers(1, 12, 100)
    expected = [best(h, w, list(shapes)) for h, w in zip(heights.tolist(), widths.tolist(), strict=True)]
    assert nearest_bucket(heights, widths, shapes).tolist() == expected


def test_a_picture_halfway_between_two_takes_the_larger_then_the_first() -> None:
    assert nearest_bucket(10, 20, [(2, 2), (1, 4)]) == 0  # both show half; as many patches
    assert nearest_bucket(10, 20, [(1, 4), (2, 2)]) == 0
    assert nearest_bucket(10, 20, [(1, 1), (1, 4)]) == 1
    assert nearest_bucket(10, 20, [(1, 4), (3, 3)]) == 1


def test_unknown_sizes_and_shapes() -> None:
    shapes = buckets(16)
    found = nearest_bucket(np.array([[0, 512], [512, 100]]), np.array([[5, 512], [0, 1000]]), shapes)
    assert found.shape == (2, 2)
    assert found.dtype == np.int64
    assert found.tolist() == [[-1, shapes.index((16, 16))], [-1, shapes.index((8, 32))]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: buckets(0), "resolution_patches must be at least 1, not 0"),
        (lambda: buckets(4, 0.5), "at least 1, not 0.5"),
        (lambda: buckets(4, float("nan")), "at least 1, not nan"),
        (lambda: nearest_bucket(3, 3, ()), "at least one"),
        (lambda: nearest_bucket(3, 3, ((0, 1),)), "at least one"),
        (lambda: nearest_bucket(-3, 3, ((1, 1),)), "negative"),
        (lambda: nearest_bucket(np.zeros(2, int), np.zeros(3, int), ((1, 1),)), "do not belong together"),
    ],
)
def test_what_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
