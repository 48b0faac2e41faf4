"""Flipped bits in what the optimizer holds: named, whatever holds them, and nothing is saved of them."""

import pytest
import torch

from tests.fault.inject import Outcome, fail_at, train_with_faults
from tests.parallel.runs import tensors_of, tiny_config
from tests.parallel.workers import free_port, run_ranks


def run(world: int, trees: list[dict], faults: list[list]) -> list[list[Outcome]]:
    """By run, then by rank."""
    ranks = run_ranks(world, train_with_faults, trees, [free_port() for _ in trees], faults)
    return [list(of_run) for of_run in zip(*ranks, strict=True)]


# What flips on rank 1 as step 3 begins: stage and layout, precision, kind, parameter, element and bit.
LAST, HEAD = "layers.1.attention.wq.weight", "final_layer.linear.weight"
FLIPS = [
    ({"zero_stage": 0}, "fp32", "master", HEAD, 3, 0),
    ({"zero_stage": 1}, "fp32", "exp_avg_sq", HEAD, 0, 31),
    ({"zero_stage": 2}, "bf16", "working copy", LAST, 7, 15),
    ({"zero_stage": 3}, "bf16", "ema", HEAD, 1, 22),
    ({"zero_stage": 3}, "fp32", "working copy", HEAD, 1, 1),
    ({"zero_stage": 1, "tensor": 2}, "bf16", "exp_avg", LAST, 5, 9),
    ({"zero_stage": 1, "pipeline": 2}, "bf16", "master", LAST, 5, 30),
]


@pytest.mark.slow
def test_a_flip_between_two_updates_is_named_and_the_run_goes_on_from_its_checkpoint(digits, tmp_path):
    trees = [
        tiny_config(tmp_path / f"{i}", digits, parallel=layout, precision=precision, checkpoint__every=2)
        for i, (layout, precision, *_) in enumerate(FLIPS)
    ]
    faults = [
        [fail_at(1, 3, "flip", tensor=(kind, name), element=element, bit=bit)] for *_, kind, name, element, bit in FLIPS
    ]
    # The first goes on; beside it the same without a fault.
    again, whole = trees[0], tiny_config(tmp_path / "whole", digits, parallel__zero_stage=0, checkpoint__every=2)
    runs = run(2, [*trees, again, whole], [*faults, [], []])
    for i, (*_, kind, name, _, _) in enumerate(FLIPS):
        for outcome in runs[i]:
            assert outcome.code == 1, outcome.said
            assert f"{kind} of {name} on rank 1 (between two updates)" in outcome.said
            assert "step_00000002 by the same command" in outcome.said
            assert outcome.said.count("between two updates)") == 2  # the sentence and --debug's traceback: one tensor
        if i:
            assert [path.name for path in (tmp_path / f"{i}" / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert [outcome.code for outcomes in runs[-2:] for outcome in outcomes] == [0] * 4
    found, expected = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_that_differ_are_named(digits, tmp_path, world):
    """A flip in the moment of an update, which no checksum of the rank's own can tell; compared after step 4."""
    cases = [
        ("flip_before_update", 1, {"zero_stage": 0}, "fp32", "master"),
        ("flip_after_update", 4, {"zero_stage": 1}, "bf16", "working copy"),
    ]
    trees = [
        tiny_config(
            tmp_path / f"{i}",
            digits,
            parallel=layout,
            precision=precision,
            train__steps=9,
            train__global_batch_packs=world,
            health__check_every=4,
        )
        for i, (_, _, layout, precision, _) in enumerate(cases)
    ]
    faults = [[fail_at(1, step, how, tensor=(kind, LAST), element=3, bit=9)] for how, step, *_, kind in cases]
    who = {
        2: "on rank 0 or on rank 1 (the replicas differ, and too few agree to say which is right)",
        3: "on rank 1 (the other replicas agree)",
    }[world]
    for (*_, kind), outcomes in zip(cases, run(world, trees, faults), strict=True):
        for outcome in outcomes:
            assert outcome.code == 1, outcome.said
            assert f"step 4: bits have flipped that nothing was to change: {kind} of {LAST} {who}" in outcome.said
            assert len(outcome.changed) == 4
    assert not (tmp_path / "0" / "checkpoints").exists()
