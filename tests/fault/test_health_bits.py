"""Flipped bits in what the optimizer holds: named, whatever holds them, and nothing is saved of them."""

import pytest
import torch

from tests.fault.inject import Outcome, fail_at, train_with_faults
from tests.parallel.runs import tensors_of, tiny_config
from tests.parallel.workers import free_port, run_ranks

# What flips on rank 1 as step 3 begins: layout, precision, kind, parameter, element and bit.
INNER, HEAD = "layers.1.attention.wq.weight", "final_layer.linear.weight"
FLIPS = [
    ({"zero_stage": 0}, "fp32", "master", HEAD, 3, 0),
    ({"zero_stage": 1}, "fp32", "exp_avg_sq", HEAD, 0, 31),
    ({"zero_stage": 2}, "bf16", "working copy", INNER, 7, 15),
    ({"zero_stage": 3}, "bf16", "ema", HEAD, 1, 22),
    ({"zero_stage": 3, "tensor": 2}, "fp32", "working copy", INNER, 1, 1),
    ({"zero_stage": 1, "pipeline": 2}, "bf16", "master", INNER, 5, 30),
]
# In the moment of an update, which no checksum of the rank's own can tell; replicas are compared after step 4.
TORN = [
    ("flip_before_update", 1, {"zero_stage": 0}, "fp32", "master"),
    ("flip_after_update", 4, {"zero_stage": 1}, "bf16", "working copy"),
]


def torn(folder, digits, world):
    """Runs that end with replicas that differ: trees and faults."""
    trees, faults = [], []
    for i, (how, step, layout, precision, kind) in enumerate(TORN):
        settings = {"train__steps": 9, "train__global_batch_packs": world, "health__check_every": 4}
        trees.append(tiny_config(folder / f"torn {i}", digits, parallel=layout, precision=precision, **settings))
        faults.append([fail_at(1, step, how, tensor=(kind, INNER), element=3, bit=9)])
    return trees, faults


def assert_torn(outcomes: list[list[Outcome]], who: str) -> None:
    for (*_, kind), of_ranks in zip(TORN, outcomes, strict=True):
        for outcome in of_ranks:
            assert outcome.code == 1, outcome.said
            assert f"step 4: bits have flipped that nothing was to change: {kind} of {INNER} {who}" in outcome.said
            assert len(outcome.changed) == 4


@pytest.mark.slow
def test_a_flip_is_named_and_the_run_goes_on_from_its_checkpoint(digits, tmp_path):
    small = {"train__global_batch_packs": 2, "checkpoint__every": 2}
    trees = [
        tiny_config(tmp_path / f"{i}", digits, parallel=layout, precision=precision, **small)
        for i, (layout, precision, *_) in enumerate(FLIPS)
    ]
    faults = [
        [fail_at(1, 3, "flip", tensor=(kind, name), element=element, bit=bit)] for *_, kind, name, element, bit in FLIPS
    ]
    # The first goes on; beside it the same without a fault.
    whole = tiny_config(tmp_path / "whole", digits, parallel__zero_stage=0, **small)
    more_trees, more_faults = torn(tmp_path, digits, 2)
    all_trees = [*trees, trees[0], whole, *more_trees]
    ports = [free_port() for _ in all_trees]
    ranks = run_ranks(2, train_with_faults, all_trees, ports, [*faults, [], [], *more_faults])
    runs = list(zip(*ranks, strict=True))
    for i, (*_, kind, name, _, _) in enumerate(FLIPS):
        for outcome in runs[i]:
            assert outcome.code == 1, outcome.said
            assert f"{kind} of {name} on rank 1 (between two updates)" in outcome.said
            assert "step_00000002 by the same command" in outcome.said
            assert outcome.said.count("between two updates)") == 2  # the sentence and --debug's traceback: one tensor
        if i:
            assert [path.name for path in (tmp_path / f"{i}" / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert [outcome.code for outcomes in runs[len(FLIPS) : len(FLIPS) + 2] for outcome in outcomes] == [0] * 4
    found, expected = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    who = "on rank 0 or on rank 1 (the replicas differ, and too few agree to say which is right)"
    assert_torn(runs[len(FLIPS) + 2 :], who)
    assert not (tmp_path / "torn 0" / "checkpoints").exists()


@pytest.mark.slow
def test_of_three_replicas_the_one_that_differs_is_named(digits, tmp_path):
    trees, faults = torn(tmp_path, digits, 3)
    ranks = run_ranks(3, train_with_faults, trees, [free_port() for _ in trees], faults)
    assert_torn(list(zip(*ranks, strict=True)), "on rank 1 (the other replicas agree)")
