"""Steps that are not finite are skipped by all ranks, under every engine, and touch nothing."""

import pytest

from tests.fault.inject import fail_at, train_with_faults
from tests.parallel.runs import metrics_of, tiny_config
from tests.parallel.workers import free_port, run_ranks

# Of each step, what is wrong on the last rank.
KINDS = ["infinite_loss", "nan_in_data", None, "nan_in_gradient", "overflow_of_norm", None]
LAYOUTS = [("fp32", {"zero_stage": stage}) for stage in range(4)]
LAYOUTS += [("bf16", {"zero_stage": 1}), ("bf16", {"zero_stage": 2, "offload_optimizer": True})]
LAYOUTS += [("bf16", {"tensor": 2, "zero_stage": 3}), ("fp32", {"tensor": 2, "zero_stage": 0})]
LAYOUTS += [("bf16", {"pipeline": 2, "zero_stage": 1}), ("fp32", {"pipeline": 2, "zero_stage": 0})]

# Gradients that DeepSpeed's norm does not count, or not on every rank: of a replicated parameter on the second
# tensor-parallel rank; of one replica alone, after the sum.
UNCOUNTED = [
    ("nan_in_replicated_gradient", {"tensor": 2, "zero_stage": 0}),
    ("nan_in_replicated_gradient", {"tensor": 2, "zero_stage": 1}),
    ("nan_in_summed_gradient", {"zero_stage": 0}),
]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Of each case: its outcome on either rank, and the lines of its metrics."""
    folder = tmp_path_factory.mktemp("runs")
    trees = [
        tiny_config(folder / f"{i}", digits, parallel=layout, precision=precision, train__steps=len(KINDS))
        for i, (precision, layout) in enumerate(LAYOUTS)
    ]
    faults = [[fail_at(1, step, kind) for step, kind in enumerate(KINDS, 1) if kind]] * len(LAYOUTS)
    for i, (kind, layout) in enumerate(UNCOUNTED):
        trees.append(tiny_config(folder / f"uncounted {i}", digits, parallel=layout, train__steps=3))
        faults.append([fail_at(1, 2, kind)])
    ranks = run_ranks(2, train_with_faults, trees, [free_port() for _ in trees], faults)
    lines = [metrics_of(folder / f"{i}") for i in range(len(LAYOUTS))]
    lines += [metrics_of(folder / f"uncounted {i}") for i in range(len(UNCOUNTED))]
    return list(zip(*ranks, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(LAYOUTS)), ids=str)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(runs, case):
    *outcomes, lines = runs[case]
    layout = LAYOUTS[case][1]
    expected = [kind is not None for kind in KINDS]
    assert [line["skipped"] for line in lines] == expected
    # The loss of a tensor-parallel rank behind the first is its own, and not reported.
    assert [line["loss"] is None for line in lines[:3]] == ["tensor" not in layout, True, False]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.said
        assert outcome.changed == tuple(not skipped for skipped in expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(UNCOUNTED)), ids=str)
def test_a_gradient_that_the_norm_does_not_count(runs, case):
    *outcomes, lines = runs[len(LAYOUTS) + case]
    assert [line["skipped"] for line in lines] == [False, True, False]
    assert [outcome.changed for outcome in outcomes] == [(True, False, True)] * 2
