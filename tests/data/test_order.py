"""The order of samples: every id once an epoch, by lanes that share the shards, a pure function of seed and epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.order import PIECES_PER_LANE, SetOrder, permutation, random_words, replacement_rows


def order_of(sizes, lanes=1, window=4, seed=0, number=0, first=0):
    return SetOrder(first + np.cumsum([0, *sizes]), lanes, window, seed, number)


def lane_ids(order, epoch, lane):
    """All of a lane's samples in an epoch, window after window."""
    ids, window = [], 0
    while len(found := order.samples(epoch, lane, window)):
        ids += found.tolist()
        window += 1
    assert len(ids) == order.count(epoch, lane)
    return ids


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@settings(max_examples=100)
@given(SIZES, st.integers(1, 9), st.integers(1, 50), st.integers(0, 3), st.integers(0, 1000))
def test_every_id_once_an_epoch(sizes, lanes, window, epoch, first):
    order = order_of(sizes, lanes, window, seed=5, first=first)
    ids = [sample for lane in range(lanes) for sample in lane_ids(order, epoch, lane)]
    assert sorted(ids) == list(range(first, first + sum(sizes)))


def test_the_same_on_every_machine():
    """Written down once: another numpy or platform must give these numbers, or no run could go on."""
    assert random_words(3, "order", 7, 1).tolist() == [13528155681444808246, 7850285904910268217, 9689997772682466]
    order = order_of([5, 3, 4], lanes=2, window=4, seed=3)
    assert [lane_ids(order, 0, lane) for lane in range(2)] == [[10, 0, 6, 8, 11, 4, 3], [9, 2, 7, 1, 5]]


def test_epochs_seeds_and_sets_differ():
    orders = {
        (seed, number, epoch): tuple(lane_ids(order_of([50] * 4, 1, 1000, seed, number), epoch, 0))
        for seed in (0, 1)
        for number in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == len(orders)


def test_a_lane_reads_a_share_of_the_shards():
    """With enough shards, each is read by one lane an epoch, and all lanes read as many over the epochs."""
    shards, lanes = 4 * 6 + 1, 6
    order = order_of([10] * shards, lanes)
    total = np.zeros(lanes, int)
    for epoch in range(12):
        read = [set(np.array(lane_ids(order, epoch, lane)) // 10) for lane in range(lanes)]
        assert sum(map(len, read)) == shards
        total += [len(of) for of in read]
    assert total.max() - total.min() <= 1


def test_few_shards_are_cut_into_pieces():
    order = order_of([1000, 1000], lanes=8, window=10**6)
    firsts, lengths = zip(*(order.pieces(0, lane) for lane in range(8)), strict=True)
    assert sum(map(len, firsts)) == PIECES_PER_LANE * 8
    assert {int(n) for of in lengths for n in of} == {62, 63}
    assert [order.count(0, lane) for lane in range(8)] == pytest.approx([250] * 8, abs=2)


def test_more_lanes_than_samples():
    order = order_of([3], lanes=5)
    for lane in range(5):
        assert {sample for epoch in range(40) for sample in lane_ids(order, epoch, lane)} == {0, 1, 2}


def test_samples_are_shuffled_within_windows_alone():
    order = order_of([100] * 20, lanes=2, window=50)
    for lane in range(2):
        firsts, lengths = order.pieces(3, lane)
        straight = np.concatenate([np.arange(a, a + n) for a, n in zip(firsts, lengths, strict=True)])
        for window in range(len(straight) // 50):
            part = order.samples(3, lane, window)
            expected = straight[50 * window : 50 * (window + 1)]
            assert sorted(part) == sorted(expected)
            assert (part != expected).mean() > 0.5


def test_a_window_of_one_shuffles_pieces_alone():
    order = order_of([3, 5], window=1)
    firsts, lengths = order.pieces(0, 0)
    straight = [int(first) + i for first, length in zip(firsts, lengths, strict=True) for i in range(length)]
    assert lane_ids(order, 0, 0) == straight


def test_positions_are_uniform():
    """Each sample comes at each place equally often: chi-squared over 2,000 epochs."""
    counts = np.zeros((6, 6))
    order = order_of([2, 4], window=6)
    for epoch in range(2000):
        counts[np.arange(6), lane_ids(order, epoch, 0)] += 1
    assert ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum() < 60  # 25 degrees of freedom: 1e-4


def test_replacements_are_distinct_and_allowed():
    allowed = np.array([3, 9, 11, 40])
    for bad in range(20):
        rows = replacement_rows(0, bad, 2, allowed)
        assert sorted(rows) == allowed.tolist()
    assert len({tuple(replacement_rows(0, bad, 2, allowed)) for bad in range(50)}) > 10
    assert len(replacement_rows(0, 1, 2, np.arange(1000))) == 100
    assert len(replacement_rows(0, 1, 2, allowed[:0])) == 0


def test_permutation_keeps_the_order_of_equals():
    assert permutation(np.array([5, 1, 5, 0], np.uint64)).tolist() == [3, 1, 0, 2]
