"""The same global batch gives the same losses, norms and weights however it is shared out."""

import pytest
import torch

from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_tree
from tests.parallel.workers import run_ranks

# The gradient of ky_norm.bias is zero in exact arithmetic; Adam turns its rounding noise into steps of full size.
NOISE_ONLY = "ky_norm.bias"


@pytest.fixture(scope="module")
def one_process(digits, tmp_path_factory):
    """Losses, norms and final tensors of the run on one process under ZeRO 0."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    run_ranks(1, train_tree, tiny_config(run_dir, digits, parallel__zero_stage=0))
    return metrics_of(run_dir), tensors_of(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "zero_stage", "packs_per_forward"),
    [(1, 0, 2), (1, 0, 4), (1, 1, 1), (2, 0, 1), (2, 1, 2), (2, 2, 1), (2, 3, 1), (4, 1, 1), (4, 3, 1)],
)
def test_every_layout_trains_alike(one_process, digits, tmp_path, world, zero_stage, packs_per_forward):
    run_dir = tmp_path / "run"
    tree = tiny_config(
        run_dir, digits, parallel__zero_stage=zero_stage, train__packs_per_forward=packs_per_forward
    )
    run_ranks(world, train_tree, tree)
    expected_metrics, expected = one_process
    for ours, theirs in zip(metrics_of(run_dir), expected_metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"])
    found = tensors_of(run_dir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(NOISE_ONLY):
            continue
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error < 1e-4 if name.startswith("exp_avg") else error < 1e-5, f"{name}: relative L2 {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters(digits, tmp_path, zero_stage):
    """Two ranks in bf16 stay near one in fp32, and the masters are not bf16 numbers."""
    losses = {}
    for precision, world in (("fp32", 1), ("bf16", 2)):
        run_dir = tmp_path / precision
        tree = tiny_config(run_dir, digits, precision=precision, parallel__zero_stage=zero_stage)
        run_ranks(world, train_tree, tree)
        losses[precision] = [line["loss"] for line in metrics_of(run_dir)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]
    master = tensors_of(tmp_path / "bf16")["master/x_embedder.weight"]
    assert not torch.equal(master, master.bfloat16().float())


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(one_process, digits, tmp_path):
    """Four steps of which each two run on another number of ranks and another ZeRO stage."""
    run_dir = tmp_path / "run"
    for world, zero_stage, steps in ((2, 3, 1), (1, 0, 2), (4, 2, 3), (2, 1, 4)):
        tree = tiny_config(run_dir, digits, parallel__zero_stage=zero_stage, train__steps=steps)
        run_ranks(world, train_tree, tree)
    expected_metrics, expected = one_process
    found = metrics_of(run_dir)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected_metrics], rel=1e-6)
    for name, value in tensors_of(run_dir).items():
        if not name.endswith(NOISE_ONLY):
            error = (value - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
            assert error < 1e-4, f"{name}: relative L2 {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero_stage"), [(1, 0), (2, 1), (2, 3)])
def test_a_resumed_run_repeats_the_unbroken_one_to_the_bit(digits, tmp_path, world, zero_stage):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"parallel__zero_stage": zero_stage, "data__shards": [str(digits)]}
    run_ranks(world, train_tree, tiny_config(whole, digits, **settings))
    for steps in (1, 3, 4):
        run_ranks(world, train_tree, tiny_config(broken, digits, train__steps=steps, **settings))
    assert [line["loss"] for line in metrics_of(broken)] == [line["loss"] for line in metrics_of(whole)]
    found, expected = tensors_of(broken), tensors_of(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero_stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_nan_on_one_rank_is_skipped_by_all(digits, tmp_path, world, zero_stage):
    results = run_ranks(world, _train_with_nan, tiny_config(tmp_path / "run", digits, parallel__zero_stage=zero_stage))
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert all(result == "unchanged" for result in results)


def _train_with_nan(rank: int, tree: dict) -> str:
    """Spoil the last rank's second step; say whether masters and EMA came through it untouched."""
    import os

    from lumina.config.load import validate
    from lumina.train import loop

    original = loop.train_step
    spoiled_rank = int(os.environ["WORLD_SIZE"]) - 1
    verdict = []

    def spoiled(engine, ema, objective, packs, **rest):
        if rest["step"] != 2:
            return original(engine, ema, objective, packs, **rest)
        before = [f.master.clone() for f in engine.fragments] + [value.clone() for value in ema.values]
        if rank == spoiled_rank:
            packs[0].data[0, 0] = float("nan")
        result = original(engine, ema, objective, packs, **rest)
        after = [f.master for f in engine.fragments] + ema.values
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        verdict.append("unchanged" if same else "changed")
        return result

    loop.train_step = spoiled
    loop.train(validate(tree, "test"))
    return verdict[0]


@pytest.mark.slow
def test_too_many_skips_in_a_row_stop_the_run(digits, tmp_path):
    tree = tiny_config(tmp_path / "run", digits, train__learning_rate=1e38, train__steps=20, train__clip_norm=1e30)
    with pytest.raises(AssertionError, match="3 steps in a row"):
        run_ranks(1, train_tree, tree)


def test_a_rank_count_that_does_not_fit_is_refused(digits, tmp_path):
    tree = tiny_config(tmp_path / "run", digits, train__global_batch_packs=3)
    with pytest.raises(AssertionError, match=r"global_batch_packs=3 cannot be shared by 2 .* is 4"):
        run_ranks(2, train_tree, tree)
    assert not (tmp_path / "run").exists()
