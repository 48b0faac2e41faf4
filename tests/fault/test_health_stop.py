"""SIGTERM and RUN/stop save and end with code 0, on all ranks after the same step."""

import pytest

from tests.fault.inject import fail_at, train_with_faults
from tests.parallel.runs import metrics_of, tiny_config
from tests.parallel.workers import free_port, run_ranks


@pytest.mark.slow
def test_whoever_asks_a_run_to_stop(digits, tmp_path):
    names = ["one rank", "a file", "at the start", "the whole group", "a stale file"]
    trees = [tiny_config(tmp_path / name, digits, train__global_batch_packs=2) for name in names]
    trees[3]["data"]["workers"] = 1
    trees[3]["train"]["steps"] = 9
    (tmp_path / "a stale file").mkdir()
    for name in ("config.yaml", "stop"):
        (tmp_path / "a stale file" / name).touch()
    faults = [
        [fail_at(1, 2, "terminate")],
        [fail_at(1, 3, "stop_file", path=str(tmp_path / "a file" / "stop"))],
        [fail_at(1, 0, "terminate_at_start")],
        [fail_at(None, 1, "signal_workers"), fail_at(0, 7, "terminate")],  # more than was decoded ahead
        [],
    ]
    ranks = run_ranks(2, train_with_faults, trees, [free_port() for _ in trees], faults)
    stopped_after = [2, 3, 1, 7, None]
    for i, (name, step) in enumerate(zip(names, stopped_after, strict=True)):
        for outcomes in ranks:
            assert outcomes[i].code == 0, outcomes[i].said
            assert len(outcomes[i].changed) == (step or 4)
        assert len(metrics_of(tmp_path / name)) == (step or 4)
        assert (tmp_path / name / "checkpoints" / f"step_{step or 4:08d}").is_dir()
        assert (f"asked to stop: saved after step {step}" in ranks[0][i].said) == (step is not None)
        assert not (tmp_path / name / "stop").exists()
    assert "stop was there before the start: removed" in ranks[0][4].said
