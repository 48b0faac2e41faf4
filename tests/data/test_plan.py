"""Packs: within their bound, every sample once an epoch, the same from any state of the same stream."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.lanes import WAITING, LaneState, thresholds
from lumina.data.plan import DataState, Plan

HASH = "0" * 64


def plan_of(sets, lengths, *, weights=None, tokens=100, packs=4, lanes=4, window=64, seed=0, **more):
    """`sets`: the shard sizes of each; `lengths`: of all samples, or a function of id."""
    edges, first = [], 0
    for sizes in sets:
        edges.append(first + np.cumsum([0, *sizes]))
        first = int(edges[-1][-1])
    table = np.array([lengths(i) for i in range(first)] if callable(lengths) else lengths)
    return Plan(
        edges,
        weights or [1.0] * len(sets),
        lambda ids, step: table[ids],
        tokens_per_pack=tokens,
        global_batch_packs=packs,
        lanes=lanes,
        window=window,
        seed=seed,
        **more,
    )


def run(plan, state, batches):
    found = []
    for _ in range(batches):
        packs, state = plan.batch(state)
        found += packs
    return found, state


def lengths_of(i):
    return 5 + (i * 37) % 60


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=6).filter(any), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.data(),
)
def test_every_sample_once_an_epoch_of_its_set(sets, lanes, packs, window, seed, data):
    """Whatever is planned, wherever it is broken off and gone on with, no id of an epoch comes twice, none is lost."""
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(sets), max_size=len(sets)))
    plan = plan_of(sets, lengths_of, weights=weights, packs=packs, lanes=lanes, window=window, seed=seed)
    state, seen = plan.start(HASH), Counter()
    for _ in range(8):
        found, state = run(plan, state, data.draw(st.integers(1, 4)))
        state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
        for pack in found:
            assert 0 < sum(lengths_of(s.sample_id) for s in pack) <= 100
            seen.update((s.sample_id, s.epoch) for s in pack)
    assert set(seen.values()) <= {1}
    # What was drawn and not yet packed waits; and below where a lane stands, nothing is missing.
    waiting = {(sample, epoch) for lane in state.lanes for sample, epoch in lane.waiting}
    assert not waiting & seen.keys()
    edges = np.cumsum([0, *(sum(sizes) for sizes in sets)])
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        for lane, at in enumerate(state.lanes):
            epoch, taken = at.at[number]
            order = plan._orders[number]
            drawn = [
                (sample, e)
                for e in range(epoch)
                for first, length in zip(*order.pieces(e, lane), strict=True)
                for sample in range(first, first + length)
            ]
            windows = [order.samples(epoch, lane, w).tolist() for w in range(-(-taken // window))]
            drawn += [(sample, epoch) for sample in [*itertools.chain(*windows)][:taken]]
            assert all(low <= sample < high for sample, _ in drawn)
            assert set(drawn) <= seen.keys() | waiting


def test_a_stream_gone_on_with_is_the_stream():
    plan = plan_of([[50, 30, 20]], lengths_of)
    whole, end = run(plan, plan.start(HASH), 60)
    for cut in (1, 17, 45):
        first, middle = run(plan_of([[50, 30, 20]], lengths_of), plan.start(HASH), cut)
        kept = DataState.from_dict(json.loads(json.dumps(middle.to_dict())))
        second, after = run(plan_of([[50, 30, 20]], lengths_of), kept, 60 - cut)
        assert first + second == whole
        assert after == end
    assert end.epoch >= 4


def test_looking_ahead_changes_nothing():
    plan = plan_of([[50, 30, 20]], lengths_of)
    _, state = run(plan, plan.start(HASH), 3)
    plan.waste(state, 20)
    plan.batch(dataclasses.replace(state))
    assert run(plan, state, 3) == run(plan_of([[50, 30, 20]], lengths_of), state, 3)


def test_packs_come_from_the_lanes_in_turn():
    """Another size of the global batch takes the same packs."""
    shards = [[10] * 40]
    four, _ = run(plan_of(shards, lengths_of, packs=4, lanes=4), plan_of(shards, lengths_of).start(HASH), 6)
    three, _ = run(plan_of(shards, lengths_of, packs=3, lanes=4), plan_of(shards, lengths_of).start(HASH), 8)
    assert four == three
    plan = plan_of(shards, lengths_of)
    shards_of = [{s.sample_id // 10 for pack in four[lane::4] for s in pack if s.epoch == 0} for lane in range(4)]
    for lane, read in enumerate(shards_of):
        assert read <= set((plan._orders[0].pieces(0, lane)[0] // 10).tolist())
    assert not shards_of[0] & shards_of[1]


def test_nobody_waits_for_ever():
    """A length that only ever fits first is taken as soon as it has waited longest."""
    plan = plan_of([[400]], lambda i: 100 if i % 40 == 0 else 30, lanes=1, packs=1)
    found, state = run(plan, plan.start(HASH), 160)
    place = {(s.sample_id, s.epoch): i for i, pack in enumerate(found) for s in pack}
    assert {sample for sample, epoch in place if epoch == 0} == set(range(400))
    # Three small ones leave room for none: each large one is passed over until it is the first that waits.
    order = plan._orders[0]
    stream = [int(sample) for window in range(7) for sample in order.samples(0, 0, window)]
    for large in range(0, 400, 40):
        assert place[large, 0] <= place[stream[max(0, stream.index(large) - 1)], 0] + WAITING
    assert max(len(lane.waiting) for lane in state.lanes) <= WAITING


@pytest.mark.parametrize(
    ("name", "draw", "tokens"),
    [
        ("64 to 4096, as many of each octave", lambda r: int(64 * 64 ** r.random()), 16384),
        ("pictures of three resolutions", lambda r: int(r.choice([272, 288, 1056, 1088, 4160, 4224])), 16384),
        (
            "pictures of three resolutions, two large ones a pack",
            lambda r: int(r.choice([272, 1088, 4160, 4224])),
            8448,
        ),
        (
            "pictures and videos",
            lambda r: int(r.choice([288, 1088, 4224])) * int(r.choice([1, 1, 1, 4, 16, 31])) + 31,
            131072,
        ),
    ],
)
def test_waste_on_realistic_mixes(name, draw, tokens):
    random = np.random.default_rng(0)
    lengths = [draw(random) for _ in range(3000)]
    plan = plan_of([[1000, 1000, 1000]], lengths, tokens=tokens, lanes=2, window=512)
    state = plan.start(HASH)
    waste = plan.waste(state, 50)
    packs, _ = run(plan, state, 50)
    used = sum(lengths[s.sample_id] for pack in packs for s in pack)
    assert waste == pytest.approx(1 - used / (200 * tokens))
    assert waste <= 0.05, name


def test_sets_are_blended_by_their_weights():
    """Each prefix of a lane's stream holds each set's share, to within a few samples."""
    weights = [1.0, 2.0, 5.0]
    plan = plan_of([[30], [300], [50]], lambda i: 10, weights=weights, tokens=10, lanes=2, packs=2)
    packs, _ = run(plan, plan.start(HASH), 400)
    for lane in range(2):
        ids = np.array([pack[0].sample_id for pack in packs[lane::2]])
        which = np.digitize(ids, [30, 330])
        for stop in range(10, 401, 13):
            share = np.bincount(which[:stop], minlength=3) / stop
            assert np.abs(share - np.array(weights) / 8).max() * stop < 3
    latest = {}
    for sample in (sample for pack in packs for sample in pack):
        number = int(np.digitize(sample.sample_id, [30, 330]))
        latest[number] = max(latest.get(number, 0), sample.epoch)
    assert latest[0] >= 2
    assert latest[1] == 0
    assert latest[2] >= 8


def test_thresholds():
    assert thresholds([1.0]) == [2**64]
    assert thresholds([1.0, 3.0]) == [2**62, 2**64]
    assert thresholds([0.1] * 3)[-1] == 2**64


def test_stages_change_lengths_and_nothing_else():
    edges = [np.array([0, 60, 120])]

    def tokens_of(ids, step):
        return np.full(len(ids), 10 if step < 5 else 40)

    plan = Plan(
        edges, [1.0], tokens_of, tokens_per_pack=80, global_batch_packs=2, lanes=2, window=16, seed=0,
        stage_of=lambda step: int(step >= 5),
    )  # fmt: skip
    state, seen = plan.start(HASH), Counter()
    for step in range(1, 15):
        packs, state = plan.batch(state, step)
        assert {len(pack) for pack in packs} == ({8} if step < 5 else {2})
        seen.update((s.sample_id, s.epoch) for pack in packs for s in pack)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 0}, "train.tokens_per_pack must be at least 1, not 0"),
        ({"packs": 0}, "train.global_batch_packs must be at least 1, not 0"),
        ({"lanes": 0}, "data.lanes must be at least 1, not 0"),
        ({"window": 0}, "data.shuffle_window must be at least 1, not 0"),
        ({"weights": [0.0]}, "each of 1 data sets needs a weight above 0, not \\[0.0\\]"),
        ({"weights": [1.0, 2.0]}, "each of 1 data sets needs a weight"),
        ({"sets": [[0]]}, "a data set holds no samples"),
        ({"sets": [[5], [5]], "weights": [1e308, 1e308]}, "data.sets: the weights .* are too large, or too far apart"),
        ({"sets": [[5], [5]], "weights": [1e-9, 1e12]}, "data.sets: the weights .* are too large, or too far apart"),
        ({"sets": [[5], [5]], "weights": [1e12, 1e-9]}, "data.sets: the weights .* are too large, or too far apart"),
    ],
)
def test_what_cannot_be_planned(change, sentence):
    sets = change.pop("sets", [[5]])
    with pytest.raises(ValueError, match=sentence):
        plan_of(sets, lengths_of, **change)


def test_a_state_of_other_lanes_or_sets():
    plan = plan_of([[9]], lengths_of)
    with pytest.raises(ValueError, match=r"the data state has 3 lanes, data\.lanes=4; set data\.lanes=3"):
        plan.batch(DataState.start(HASH, 64, 3))
    with pytest.raises(ValueError, match="the data state is of 2 data sets, there are 1"):
        plan.batch(DataState.start(HASH, 64, 4, sets=2))


GOOD = DataState(7, "a" * 64, 5, (LaneState(3, ((1, 2),), ((5, 0), (6, 1))),)).to_dict()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"packs": -1}, "packs of a data state must be a whole number of at least 0, not -1"),
        ({"window": 0}, "window of a data state must be a whole number of at least 1, not 0"),
        ({"packs": True}, "packs of a data state must be a whole number"),
        ({"index_hash": "A" * 64}, "index_hash of a data state must be 64 hex digits"),
        ({"offset": 3}, "a data state has the keys .* earlier version of the data order"),
        ({"lanes": []}, "lanes of a data state must be a list"),
        ({"lanes": [{"drawn": 1}]}, "a lane's state has drawn, at and waiting"),
        ({"lanes": [{"drawn": -1, "at": [], "waiting": []}]}, "whole numbers of at least 0, in pairs"),
        ({"lanes": [{"drawn": 1, "at": [[1, 2, 3]], "waiting": []}]}, "whole numbers of at least 0, in pairs"),
        ({"lanes": [{"drawn": 1, "at": [[1, 2.5]], "waiting": []}]}, "whole numbers of at least 0, in pairs"),
        ({"lanes": [{"drawn": 1, "at": 3, "waiting": []}]}, "a lane's state has drawn, at and waiting"),
    ],
)
def test_a_damaged_state(change, sentence):
    assert DataState.from_dict(GOOD).to_dict() == GOOD
    with pytest.raises(ValueError, match=sentence):
        DataState.from_dict(GOOD | change)
