"""Draws that are a function of the sample and of nothing else."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lumina.parallel.randomness import Randomness


@dataclass(frozen=True)
class Place:
    """A showing of a sample."""

    sample_id: int = 5
    epoch: int = 1
    occurrence: int = 0


def draws(seed=0, purpose="noise", place=None, shape=(4,)):
    randomness = Randomness(seed)
    return randomness.normal(purpose, place or Place(), shape), randomness.uniform(purpose, place or Place())


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1] == b[1]


def test_one_identity_is_one_draw():
    assert_same(draws(), draws())
    assert draws()[0].dtype == torch.float32
    assert draws(shape=(2, 3, 4))[0].shape == (2, 3, 4)
    # What is flat to one caller is a picture to another.
    assert torch.equal(draws(shape=(24,))[0], draws(shape=(2, 3, 4))[0].flatten())


def test_anything_with_the_identity_will_do():
    """A planned place and a decoded sample name the same showing."""

    class Decoded:
        sample_id, epoch, occurrence, key = 5, 1, 0, "a"

    assert_same(draws(place=Decoded()), draws())


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"purpose": "time"},
        {"place": Place(sample_id=6)},
        {"place": Place(epoch=2)},
        {"place": Place(occurrence=1)},
    ],
    ids=["seed", "purpose", "sample", "epoch", "occurrence"],
)
def test_each_part_of_the_identity_counts(changed):
    normal, uniform = draws(**changed)
    assert not torch.isclose(normal, draws()[0], atol=1e-3).any()
    assert abs(uniform - draws()[1]) > 1e-4


def test_parts_do_not_run_together():
    """(1, 23) and (12, 3) are two samples, and so are those whose numbers are swapped."""
    places = [Place(*numbers) for numbers in itertools.product((0, 1, 2, 3, 11, 12, 23, 111), repeat=3)]
    found = {Randomness(seed).uniform("time", place) for seed in (0, 1, 11) for place in places}
    assert len(found) == 3 * len(places)


def test_pinned():
    """A run that was started by an older release goes on with the same numbers."""
    assert Randomness(0).uniform("time", Place()) == 0.10237981249581651
    assert Randomness(0).normal("noise", Place(), (3,)).tolist() == pytest.approx(
        [-0.9989807, 0.07728779, -0.8601248], rel=1e-6
    )


@pytest.fixture(scope="module", params=[10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def uniforms(request):
    """Times of neighbouring samples."""
    randomness = Randomness(7)
    return np.array([randomness.uniform("time", Place(sample_id=i)) for i in range(request.param)])


def kolmogorov_smirnov(values, cdf):
    """sqrt(n) times the largest distance; above 1.95 once in a thousand times."""
    expected = cdf(np.sort(values))
    steps = np.arange(len(values) + 1) / len(values)
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    return math.sqrt(len(values)) * distance


def test_uniforms_of_neighbouring_samples_are_uniform_and_unrelated(uniforms):
    count = len(uniforms)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(uniforms.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    assert kolmogorov_smirnov(uniforms, lambda x: x) < 1.95
    for lag in (1, 2, 3, 16, 1000):
        correlation = np.corrcoef(uniforms[:-lag], uniforms[lag:])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(count - lag)


def normal_cdf(x):
    return 0.5 * torch.special.erfc(torch.from_numpy(-x / math.sqrt(2))).numpy()


def assert_standard_normal(values):
    values = values.double().flatten().numpy()
    assert abs(values.mean()) < 4 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / values.size)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / values.size)
    assert kolmogorov_smirnov(values, normal_cdf) < 1.95


def test_normals_of_one_sample_are_normal():
    assert_standard_normal(Randomness(0).normal("noise", Place(), (10, 100, 100)))


def test_normals_of_neighbours_are_normal_and_unrelated():
    randomness = Randomness(0)
    each = [randomness.normal("noise", Place(sample_id=i // 2, epoch=i % 2), (100,)) for i in range(1000)]
    values = torch.stack(each)
    assert_standard_normal(values)
    # Every two of a thousand: the largest of so many correlations of 100 numbers is about 0.5.
    correlations = torch.corrcoef(values).fill_diagonal_(0)
    assert correlations.abs().max() < 0.65
    assert abs(correlations.mean()) < 0.002


def test_purposes_are_unrelated(uniforms):
    """A dropped caption says nothing about its sample's time or noise."""
    randomness = Randomness(7)
    others = np.array([randomness.uniform("caption dropout", Place(sample_id=i)) for i in range(len(uniforms))])
    assert abs(np.corrcoef(uniforms, others)[0, 1]) < 4 / math.sqrt(len(uniforms))


def test_order_and_company_do_not_matter():
    randomness = Randomness(3)
    places = [Place(sample_id=i) for i in range(20)]
    forwards = {p.sample_id: randomness.normal("noise", p, (5,)) for p in places}
    for place in reversed(places):
        randomness.uniform("time", place)
        assert torch.equal(randomness.normal("noise", place, (5,)), forwards[place.sample_id])


def test_global_random_states_are_neither_read_nor_moved():
    before = draws()
    torch.manual_seed(123)
    np.random.seed(123)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert_same(draws(), before)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
