"""Order and plan: each id once an epoch, packs within their bound, the stream the same from any state."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.order import epoch_order, replacement_candidates
from lumina.data.plan import DataState, Plan

HASH = "0" * 64


def planned(tokens: list[int], room: int, packs: int, seed: int = 0) -> Plan:
    lengths = np.array(tokens, np.int64)
    return Plan(lambda epoch: epoch_order(seed, epoch, len(tokens)), lambda ids: lengths[ids], room, packs)


def stream(plan: Plan, state: DataState, batches: int) -> tuple[list, DataState]:
    samples = []
    for _ in range(batches):
        packs, state = plan.batch(state)
        samples += [sample for pack in packs for sample in pack]
    return samples, state


def test_order_is_pinned() -> None:
    # Written down once: a run must find its order again on any machine and under later versions of numpy.
    assert epoch_order(0, 0, 10).tolist() == [6, 9, 0, 4, 5, 3, 8, 7, 2, 1]
    assert epoch_order(0, 1, 10).tolist() == [8, 4, 6, 2, 0, 5, 9, 7, 3, 1]
    assert epoch_order(0, 0, 10).dtype == np.int64


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), size=st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_order_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    order = epoch_order(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    if size > 50:
        assert order.tolist() != epoch_order(seed, epoch + 1, size).tolist()
        assert order.tolist() != epoch_order(seed + 1, epoch, size).tolist()


@pytest.mark.parametrize(("allowed", "count"), [(3, 100), (300, 100), (10_000, 100)])
def test_replacement_candidates_are_distinct_and_repeatable(allowed: int, count: int) -> None:
    ids = np.arange(7, 7 + allowed)
    drawn = replacement_candidates(1, 5, 0, ids, count).tolist()
    assert len(set(drawn)) == len(drawn) == min(count, allowed)
    assert set(drawn) <= set(ids.tolist())
    assert drawn == replacement_candidates(1, 5, 0, ids, count).tolist()
    assert drawn != replacement_candidates(1, 6, 0, ids, count).tolist()


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    extra=st.integers(0, 80),
    packs=st.integers(1, 5),
    batches=st.integers(1, 12),
    cut=st.integers(0, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_packs_are_next_fit_over_an_endless_stream(tokens, extra, packs, batches, cut, seed) -> None:
    room = max(tokens) + extra
    state = DataState.start(HASH)
    flat, batch_states = [], [state]
    for _ in range(batches):
        batch, state = planned(tokens, room, packs, seed).batch(state)  # a fresh plan: nothing is remembered
        assert len(batch) == packs
        flat += batch
        batch_states.append(state)
    assert state.packs == packs * batches
    for pack, following in zip(flat, [*flat[1:], None], strict=True):
        used = sum(tokens[sample.sample_id] for sample in pack)
        assert 0 < used <= room
        assert following is None or used + tokens[following[0].sample_id] > room, "a sample that fits was left out"
    samples = [sample for pack in flat for sample in pack]
    expected = [
        (sample_id, epoch)
        for epoch in range(samples[-1].epoch + 1)
        for sample_id in epoch_order(seed, epoch, len(tokens)).tolist()
    ]
    assert [(sample.sample_id, sample.epoch) for sample in samples] == expected[: len(samples)]
    assert all(sample.occurrence == 0 for sample in samples)
    cut = min(cut, batches)
    rest, _ = stream(planned(tokens, room, packs, seed), batch_states[cut], batches - cut)
    assert samples[len(samples) - len(rest) :] == rest


def test_a_pack_runs_on_across_several_epochs() -> None:
    packs, state = planned([1, 1, 1], 8, 1).batch(DataState.start(HASH))
    assert [sample.epoch for sample in packs[0]] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (state.epoch, state.offset) == (2, 2)


def test_too_long_a_sample_is_named_before_the_first_step() -> None:
    lengths = np.array([3, 9, 12, 2])
    with pytest.raises(
        ValueError, match=r"the third has 12 tokens and 2 of 4 samples .*tokens_per_pack=8.*at least 12"
    ):
        Plan(lambda e: np.arange(4), lambda ids: lengths[ids], 8, 1, ["the first", "", "the third"].__getitem__)


def test_unusable_samples_take_the_median_length() -> None:
    plan = planned([5, 0, 7, 6, 0], 8, 1)
    assert plan.tokens.tolist() == [5, 6, 7, 6, 6]
    assert plan.usable.tolist() == [True, False, True, True, False]
    with pytest.raises(ValueError, match="none of the 2 samples can be used"):
        planned([0, 0], 8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 8, 1), "at least 1, not 0"),
        (([1], 0, 1), "tokens_per_pack must be at least 1"),
        (([1], 8, 0), "global_batch_packs must be at least 1"),
        (([1, -1], 8, 1), "one whole number of at least 0 for each of the 2 samples"),
    ],
)
def test_bad_plans_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(*arguments)


def test_waste_is_the_share_of_unused_room() -> None:
    assert planned([3, 3, 3], 8, 2).waste(DataState.start(HASH), 5) == pytest.approx(0.25)
    assert planned([4, 4], 8, 2).waste(DataState.start(HASH), 5) == 0


def test_state_survives_json_and_is_read_strictly() -> None:
    state = DataState(3, 17, 240, "ab" * 32)
    stored = json.dumps(state.to_dict())
    assert DataState.from_dict(json.loads(stored)) == state
    assert len(stored) < 200
    good = state.to_dict()
    for change, message in (
        ({"extra": 1}, "has the keys"),
        ({"epoch": -1}, "epoch of a data state must be a whole number of at least 0, not -1"),
        ({"offset": True}, "offset"),
        ({"packs": "3"}, "packs"),
        ({"index_hash": "xyz"}, "64 hex digits"),
    ):
        with pytest.raises(ValueError, match=message):
            DataState.from_dict(good | change)
    with pytest.raises(ValueError, match="has the keys"):
        DataState.from_dict({"epoch": 0})


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 7 of its epoch, but an epoch has 3"):
        planned([1, 1, 1], 8, 1).batch(DataState(0, 7, 0, HASH))


def test_memory_does_not_grow_with_steps() -> None:
    plan, state = planned([3] * 300, 64, 8), DataState.start(HASH)
    tracemalloc.start()
    _, state = stream(plan, state, 20)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        _, state = plan.batch(state)
    assert state.epoch > 100
    assert tracemalloc.get_traced_memory()[0] - before < 30_000
    tracemalloc.stop()
