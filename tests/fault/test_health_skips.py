"""Steps that are not finite are skipped by all ranks, under every engine, and touch nothing."""

import pytest

from tests.fault.inject import fail_at, train_with_faults
from tests.parallel.runs import metrics_of, tiny_config
from tests.parallel.workers import free_port, run_ranks

# Steps 1, 2, 4 and 5 of six: what is wrong on the last rank.
KINDS = ["infinite_loss", "nan_in_data", None, "nan_in_gradient", "overflow_of_norm", None]
FP32 = [{"zero_stage": stage} for stage in range(4)]
FP32 += [{"tensor": 2, "zero_stage": 0}, {"pipeline": 2, "zero_stage": 0}, {"pipeline": 2, "zero_stage": 1}]
BF16 = [{"zero_stage": 1}, {"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 3}]
BF16 += [{"tensor": 2, "zero_stage": 1}, {"pipeline": 2, "zero_stage": 1}, {"tensor": 2, "zero_stage": 3}]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "layouts"), [("fp32", FP32), ("bf16", BF16)])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(digits, tmp_path, precision, layouts):
    trees = [
        tiny_config(tmp_path / f"{i}", digits, parallel=layout, precision=precision, train__steps=len(KINDS))
        for i, layout in enumerate(layouts)
    ]
    faults = [fail_at(1, step, kind) for step, kind in enumerate(KINDS, 1) if kind]
    ranks = run_ranks(2, train_with_faults, trees, [free_port() for _ in trees], [faults] * len(trees))
    expected = [kind is not None for kind in KINDS]
    for i, layout in enumerate(layouts):
        lines = metrics_of(tmp_path / f"{i}")
        assert [line["skipped"] for line in lines] == expected, layout
        # The loss of a tensor-parallel rank behind the first is its own, and not reported.
        assert [line["loss"] is None for line in lines[:3]] == ["tensor" not in layout, True, False], layout
        for outcomes in ranks:
            assert outcomes[i].code == 0, outcomes[i].said
            assert outcomes[i].changed == tuple(not skipped for skipped in expected), layout


@pytest.mark.slow
def test_a_gradient_that_the_norm_does_not_count(digits, tmp_path):
    """Of a replicated parameter on the second tensor-parallel rank; of one replica alone, after the sum."""
    cases = [
        ("nan_in_replicated_gradient", {"tensor": 2, "zero_stage": 0}),
        ("nan_in_replicated_gradient", {"tensor": 2, "zero_stage": 1}),
        ("nan_in_summed_gradient", {"zero_stage": 0}),
    ]
    trees = [
        tiny_config(tmp_path / f"{i}", digits, parallel=layout, train__steps=3) for i, (_, layout) in enumerate(cases)
    ]
    faults = [[fail_at(1, 2, kind)] for kind, _ in cases]
    ranks = run_ranks(2, train_with_faults, trees, [free_port() for _ in trees], faults)
    for i in range(len(cases)):
        assert [line["skipped"] for line in metrics_of(tmp_path / f"{i}")] == [False, True, False]
        for outcomes in ranks:
            assert outcomes[i].changed == (True, False, True)
