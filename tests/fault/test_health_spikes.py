"""Spikes: warned of, or gone back from without the batches that led there, the same on every rerun."""

import json
import shutil

import pytest
import torch

from lumina.checkpoint.load import latest_checkpoint
from tests.fault.inject import fail_at, train_with_faults
from tests.parallel.runs import metrics_of, tensors_of, tiny_config
from tests.parallel.workers import free_port, run_ranks

SETTINGS = {"train__steps": 13, "checkpoint__every": 4, "health__spike": "rollback", "health__spike_window": 8}
SETTINGS |= {"train__global_batch_packs": 2}
# Elsewhere than data-parallel, by the gradient norm, at a step that is saved.
OTHERS = [{"pipeline": 2, "zero_stage": 0}, {"tensor": 2, "zero_stage": 3}]
NORM = {"health__spike_of": "grad_norm", "train__steps": 9, "checkpoint__every": 3}


def without_times(run_dir):
    """The lines of metrics.jsonl, without what depends on the clock."""
    times = ("second", "seconds", "tflops_per_device", "mfu", "peak_memory_bytes")
    return [{key: x for key, x in line.items() if not key.endswith(times)} for line in metrics_of(run_dir)]


@pytest.mark.slow
def test_a_run_that_went_back_is_one_that_was_told_to_leave_the_batches_out(digits, tmp_path):
    spiked, told, killed, elsewhere = (tmp_path / name for name in ("spiked", "told", "killed", "elsewhere"))

    def tree(run_dir, **changes):
        return tiny_config(run_dir, digits, **SETTINGS | changes)

    spike = fail_at(None, 11, "spike")
    first = [
        (tree(spiked), [spike]),
        (tree(killed), [spike, fail_at(None, 0, "die_when_going_back")]),
        (tree(elsewhere), [spike, fail_at(1, 0, "terminate_when_going_back")]),
        (tree(tmp_path / "too early", checkpoint__every=100), [spike]),
        (tree(tmp_path / "often", health__rollback_limit=1), [spike, fail_at(None, 12, "spike")]),
    ]
    first += [
        (tree(tmp_path / f"{i}", parallel=layout, **NORM), [fail_at(None, 9, "spike")])
        for i, layout in enumerate(OTHERS)
    ]
    trees, faults = zip(*first, strict=True)
    ranks = run_ranks(2, train_with_faults, list(trees), [free_port() for _ in trees], list(faults))
    for outcomes in ranks:
        assert [outcome.code for outcome in outcomes] == [0, 1, 0, 0, 1, 0, 0], outcomes
    said = [outcome.said for outcome in ranks[0]]

    record = [json.loads(line) for line in (spiked / "skipped_batches.jsonl").read_text().splitlines()]
    assert [(one["first"], one["last"], one["checkpoint"], one["spike_of"]) for one in record] == [(9, 11, 8, "loss")]
    assert "going back to the checkpoint of step 8; the batches of steps 9 to 11 are left out" in said[0]
    lines = metrics_of(spiked)
    assert [line["step"] for line in lines] == list(range(1, 14))
    assert [line["step"] for line in lines if line["left_out"]] == [9, 10, 11]
    assert [line["loss"] is None and line["skipped"] and line["samples"] == 0 for line in lines[8:11]] == [True] * 3
    assert not any(line["spike"] for line in lines)

    # The batches are consumed: after the last step the stream stands where it does without a rollback.
    streams = [latest_checkpoint(folder).manifest.data for folder in (spiked, tmp_path / "too early")]
    assert streams[0] == streams[1]

    # Killed between the record and the rollback: the record is there, and nothing was saved after step 8.
    assert (killed / "skipped_batches.jsonl").read_bytes() == (spiked / "skipped_batches.jsonl").read_bytes()
    # Asked to stop while it went back, on one rank: saved after the first step that is left out.
    assert [line["step"] for line in metrics_of(elsewhere)] == list(range(1, 10))
    assert max(path.name for path in (elsewhere / "checkpoints").iterdir()) == "step_00000009"
    assert "asked to stop: saved after step 9" in said[2]

    assert "there is no checkpoint to go back to yet: the run goes on with it" in said[3]
    assert [line["step"] for line in metrics_of(tmp_path / "too early") if line["spike"]] == [11]
    assert not (tmp_path / "too early" / "skipped_batches.jsonl").exists()
    assert "has gone back to the checkpoint of step 8 1 times already (health.rollback_limit=1)" in said[4]

    told.mkdir()
    for name in ("skipped_batches.jsonl", "config.yaml"):
        shutil.copy(spiked / name, told / name)
    layout = {"zero_stage": 3, "ring": 2}
    trees = [tree(told), tree(killed), tree(elsewhere, parallel=layout)]
    entry = {"first": 7, "last": 9, "checkpoint": 6, "spike_of": "grad_norm", "value": 1.0, "limit": 0.5}
    for i, other in enumerate(OTHERS):
        (tmp_path / f"told {i}").mkdir()
        (tmp_path / f"told {i}" / "config.yaml").touch()
        (tmp_path / f"told {i}" / "skipped_batches.jsonl").write_text(json.dumps(entry))
        trees.append(tree(tmp_path / f"told {i}", parallel=other, **NORM))
    ranks = run_ranks(2, train_with_faults, trees, [free_port() for _ in trees], [[]] * 5)
    assert [outcome.code for outcomes in ranks for outcome in outcomes] == [0] * 10, ranks
    pairs = [(told, spiked), (killed, spiked)]
    pairs += [(tmp_path / f"told {i}", tmp_path / f"{i}") for i in range(len(OTHERS))]
    for run_dir, went_back in pairs:
        assert without_times(run_dir) == without_times(went_back)
        found, expected = tensors_of(run_dir), tensors_of(went_back)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [line["left_out"] for line in metrics_of(elsewhere)] == [line["left_out"] for line in lines]
    losses = [[line["loss"] for line in metrics_of(run_dir)[11:]] for run_dir in (elsewhere, spiked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
