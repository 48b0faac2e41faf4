"""The same global batch gives the same losses, norms and weights however it is shared out."""

import os

import pytest
import torch

from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_on, train_tree, train_trees
from tests.parallel.workers import free_port, run_ranks

# The gradient of ky_norm.bias is zero in exact arithmetic; Adam turns its rounding noise into steps.
NOISE_ONLY = "ky_norm.bias"


@pytest.fixture(scope="module")
def one_process(digits, tmp_path_factory):
    """Losses, norms and final tensors of the run on one process under ZeRO 0."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    train_on(1, tiny_config(run_dir, digits, parallel__zero_stage=0))
    return metrics_of(run_dir), tensors_of(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (1, [(0, 4), (2, 2), (3, 1)]),
        (2, [(0, 1), (1, 2), (3, 2)]),
    ],
)
def test_every_layout_trains_alike(one_process, digits, tmp_path, world, layouts):
    """`layouts`: ZeRO stage and packs per forward pass, the rest of a rank's packs being accumulated."""
    trees = [
        tiny_config(
            tmp_path / f"zero{stage}_{at_once}",
            digits,
            parallel__zero_stage=stage,
            train__packs_per_forward=at_once,
        )
        for stage, at_once in layouts
    ]
    train_on(world, *trees)
    expected_metrics, expected = one_process
    for stage, at_once in layouts:
        run_dir = tmp_path / f"zero{stage}_{at_once}"
        for ours, theirs in zip(metrics_of(run_dir), expected_metrics, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"])
        assert_equal_tensors(tensors_of(run_dir), expected)


def assert_equal_tensors(found, expected):
    """Weights and EMA within 1e-5 relative L2, moments within 1e-4."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith(NOISE_ONLY):
            error = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
            assert error < (1e-4 if name.startswith("exp_avg") else 1e-5), f"{name}: relative L2 {error:.1e}"


@pytest.mark.slow
def test_bf16_keeps_fp32_masters(one_process, digits, tmp_path):
    """Two ranks in bf16 stay near one in fp32 under every layout, and the masters are not bf16 numbers."""
    layouts = [{"zero_stage": stage} for stage in (1, 2, 3)]
    layouts += [{"tensor": 2}, {"tensor": 2, "sequence": True, "zero_stage": 3}, {"tensor": 2, "zero_stage": 2}]
    layouts += [{"pipeline": 2}, {"ring": 2, "recompute": "selective"}, {"ulysses": 2, "offload_optimizer": True}]
    trees = [
        tiny_config(tmp_path / f"{i}", digits, precision="bf16", parallel=layout) for i, layout in enumerate(layouts)
    ]
    train_on(2, *trees)
    losses, norms = ([line[key] for line in one_process[0]] for key in ("loss", "grad_norm"))
    for i, layout in enumerate(layouts):
        ours = metrics_of(tmp_path / f"{i}")
        assert [line["loss"] for line in ours] == pytest.approx(losses, rel=2e-2), layout
        assert [line["grad_norm"] for line in ours] == pytest.approx(norms, rel=5e-2), layout
        assert [line["loss"] for line in ours] != losses
        master = tensors_of(tmp_path / f"{i}")["master/x_embedder.weight"]
        assert not torch.equal(master, master.bfloat16().float())


# Data parallel 4 → 2 → 1 → 4, every axis on and off, every ZeRO stage, offload, asynchronous saves.
MOVES = [
    (4, {"zero_stage": 1}),
    (2, {"zero_stage": 3}),
    (1, {"zero_stage": 0}),
    (4, {"zero_stage": 2, "offload_optimizer": True}),
    (4, {"tensor": 2, "zero_stage": 3}),
    (4, {"tensor": 2, "pipeline": 2, "zero_stage": 1}),
    (2, {"ring": 2, "zero_stage": 2}),
    (4, {"pipeline": 2, "ring": 2, "zero_stage": 0}),
    (2, {"tensor": 2, "sequence": True, "zero_stage": 0}),
    (4, {"ulysses": 2, "zero_stage": 3, "offload_optimizer": True}),
]


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(digits, tmp_path):
    """A step under each layout. What the next layout has read, written again, is to the bit what was saved."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    train_on(1, tiny_config(whole, digits, parallel__zero_stage=0, train__steps=len(MOVES)))
    for steps, (world, parallel) in enumerate(MOVES, 1):
        tree = tiny_config(run_dir, digits, parallel=parallel, train__steps=steps, checkpoint__async=steps % 2 == 0)
        tree["checkpoint"]["keep"] = 100
        run_ranks(world, _write_again_and_train, tree, tmp_path / f"again{steps}")
        if steps > 1:
            saved, again = run_dir / "checkpoints" / f"step_{steps - 1:08d}", tmp_path / f"again{steps}"
            before, after = checkpoint_tensors(saved), tensors_of(again)
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], value) for name, value in before.items()), (world, parallel)
    found, expected = metrics_of(run_dir), metrics_of(whole)
    assert [line["step"] for line in found] == list(range(1, len(MOVES) + 1))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert_equal_tensors(tensors_of(run_dir), tensors_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"tensor": 2, "zero_stage": 1}])
def test_a_rank_reads_what_it_needs(digits, tmp_path, parallel):
    """Of masters, moments and average together, once they are checked, two ranks read each number once."""
    train_on(1, tiny_config(tmp_path / "run", digits, train__steps=1))
    tree = tiny_config(tmp_path / "run", digits, train__steps=2, parallel=parallel)
    total = sum(value.numel() for value in tensors_of(tmp_path / "run").values())
    read = run_ranks(2, _count_what_is_read, tree)
    # Under tensor parallel each has the norms, gates and tokens that are on both.
    shared = 1.35 if "tensor" in parallel else 1.02
    assert total <= sum(read) <= shared * total
    assert max(read) < 0.68 * total


def _count_what_is_read(rank: int, tree: dict) -> int:
    from lumina.checkpoint.load import Checkpoint

    read, numbers = Checkpoint.read, []

    def counted(*arguments, **rest):
        values = read(*arguments, **rest)
        numbers.append(values.numel())
        return values

    Checkpoint.read = counted
    train_tree(rank, tree)
    return sum(numbers)


def checkpoint_tensors(folder):
    from lumina.checkpoint.load import Checkpoint

    checkpoint = Checkpoint(folder)
    return {f"{kind}/{n}": v for kind in checkpoint.manifest.tensors for n, v in checkpoint.state_dict(kind).items()}


def _write_again_and_train(rank: int, tree: dict, folder) -> None:
    from lumina.train import loop

    class WritesAgain(loop.Trainer):
        def run(self, again):
            if self.step:
                run_dir, self.saver._run_dir = self.saver._run_dir, folder
                self._save(None, loop.Metrics(self.config, self.step, enabled=False), wait=True)
                self.saver._run_dir = run_dir
            return super().run(again)

    loop.Trainer = WritesAgain
    train_tree(rank, tree)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stages"), [(1, [0]), (2, [1, 2, 3])])
def test_a_resumed_run_repeats_the_unbroken_one_to_the_bit(digits, tmp_path, world, stages):
    trees = []
    for stage in stages:
        trees.append(tiny_config(tmp_path / f"whole{stage}", digits, parallel__zero_stage=stage))
        trees += [
            tiny_config(tmp_path / f"broken{stage}", digits, parallel__zero_stage=stage, train__steps=steps)
            for steps in (1, 3, 4)
        ]
    train_on(world, *trees)
    for stage in stages:
        broken, whole = tmp_path / f"broken{stage}", tmp_path / f"whole{stage}"
        assert [line["loss"] for line in metrics_of(broken)] == [line["loss"] for line in metrics_of(whole)]
        found, expected = tensors_of(broken), tensors_of(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


TWO_RANKS = [  # of one axis each, by the ZeRO stages that go with it
    *({"zero_stage": stage} for stage in range(4)),
    *({"tensor": 2, "zero_stage": stage} for stage in (0, 1, 3)),
    *({"pipeline": 2, "zero_stage": stage} for stage in (0, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (1, [{"zero_stage": 0}]),
        (2, [*TWO_RANKS, {"ring": 2, "zero_stage": 2}, {"ulysses": 2}, {"tensor": 2, "sequence": True}]),
    ],
)
def test_a_nan_on_one_rank_is_skipped_by_all(digits, tmp_path, world, layouts):
    trees = [tiny_config(tmp_path / f"{i}", digits, parallel=layout) for i, layout in enumerate(layouts)]
    verdicts = run_ranks(world, _train_with_nan, trees, [free_port() for _ in trees])
    for i, layout in enumerate(layouts):
        lines = metrics_of(tmp_path / f"{i}")
        assert [line["skipped"] for line in lines] == [False, True, False, False], layout
        assert lines[1]["loss"] is None
    assert verdicts == [["unchanged"] * len(layouts)] * world


def _train_with_nan(rank: int, trees: list[dict], ports: list[int]) -> list[str]:
    """Spoil the last rank's second step; say whether masters and EMA came through it untouched."""
    from lumina.train import loop

    original = loop.train_step
    spoiled_rank = int(os.environ["WORLD_SIZE"]) - 1
    verdicts = []

    def spoiled(engine, ema, objective, packs, **rest):
        if rest["step"] != 2:
            return original(engine, ema, objective, packs, **rest)
        before = [f.master.clone() for f in engine.fragments] + [value.clone() for value in ema.values]
        if rank == spoiled_rank:
            packs[0].data[0, 0] = float("nan")
        result = original(engine, ema, objective, packs, **rest)
        after = [f.master for f in engine.fragments] + ema.values
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        verdicts.append("unchanged" if same else "changed")
        return result

    loop.train_step = spoiled
    train_trees(rank, trees, ports)
    return verdicts


@pytest.mark.slow
def test_too_many_skips_in_a_row_stop_the_run(digits, tmp_path):
    tree = tiny_config(tmp_path / "run", digits, train__learning_rate=1e30, train__steps=20, train__clip_norm=1e30)
    with pytest.raises(AssertionError, match="3 steps in a row"):
        run_ranks(1, train_tree, tree)
    assert all(line["skipped"] for line in metrics_of(tmp_path / "run")[-3:])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rank_count_that_does_not_fit_is_refused(digits, tmp_path):
    tree = tiny_config(tmp_path / "run", digits, train__global_batch_packs=3)
    with pytest.raises(AssertionError, match=r"global_batch_packs=3 cannot be shared by 2 .* is 2"):
        run_ranks(2, train_tree, tree)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_folder_in_use_is_refused(digits, tmp_path):
    from lumina.train.assemble import run_folder

    with run_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        with pytest.raises(AssertionError, match="another process trains there"):
            run_ranks(1, train_tree, tiny_config(tmp_path / "run", digits))
    run_ranks(1, train_tree, tiny_config(tmp_path / "run", digits, train__steps=1))
    assert len(metrics_of(tmp_path / "run")) == 1


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(one_process, digits, tmp_path):
    """Asked to stop before its first step, a run takes that step, saves it and ends without an error."""
    tree = tiny_config(tmp_path / "run", digits, parallel__zero_stage=0)
    run_ranks(1, _train_terminated, tree)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1]
    run_ranks(1, train_tree, tree)
    assert [line["loss"] for line in metrics_of(tmp_path / "run")] == [line["loss"] for line in one_process[0]]


def _train_terminated(rank: int, tree: dict) -> None:
    import signal

    from lumina.train import loop

    assemble = loop.assemble

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return assemble(*arguments)

    loop.assemble = terminated
    train_tree(rank, tree)
