"""`lumina plan --measured`: plans beside rows of `lumina benchmark throughput`."""

import json

import pytest

from lumina.benchmark.plan_measured import spearman
from lumina.cli import main
from lumina.parallel.layout import described
from lumina.planner.memory import meta_model
from lumina.planner.search import candidate
from tests.unit.plans import SMALL, planned

SAMPLES, PACKS = 3, 4  # of a pack; of a step


def row(axis, speed, **changes):
    """Of four ranks of one axis, `speed` times as fast as planned, and with twice the memory."""
    work = planned(gpus=4, packs=PACKS, samples=SAMPLES)
    parallel = work.config.parallel.model_copy(update={axis: 4})
    plan = candidate(work, parallel)
    tokens = PACKS * SAMPLES * 4096
    measured = {
        "model": "600m",
        "parameters": sum(p.numel() for p in meta_model(work.sizes).parameters()),
        "layout": described(parallel, 4),
        "precision": "bf16",
        "recompute": "none",
        "world": 4,
        "tokens_per_sample": 4096,
        "text_tokens": 16,
        "samples": PACKS * SAMPLES,
        "samples_per_pack": SAMPLES,
        "tokens": tokens,
        "tokens_per_second": speed * tokens / plan.time.total,
        "model_tflops": 1.0,
        "memory": {"peak": 2 * plan.memory.on_device},
    }
    return {name: value for name, value in (measured | changes).items() if value is not None}


def beside(tmp_path, rows, *words):
    path = tmp_path / "rows.json"
    facts = {"date": "today", "device": "some", "python": "3", "packages": {}}
    path.write_text(json.dumps(facts | {"rows": rows}))
    return main(["plan", "--measured", str(path), *words])


def test_a_plan_beside_what_was_measured(tmp_path, capsys):
    """A record made by hand, in which one layout is as fast as planned and the other half as fast."""
    rows = [row("ring", 1.0), row("tensor", 0.5)]
    assert beside(tmp_path, rows, *SMALL) == 0
    said = capsys.readouterr().out
    assert all(f"| {ratio} " in said for ratio in ("1.00", "2.00"))
    assert said.count("0.500 |") == 2
    assert beside(tmp_path, rows) == 2
    error = capsys.readouterr().err
    assert "row 0, counted from 0, of --measured" in error
    assert "give the settings of the model" in error


def test_a_record_of_before_takes_the_samples_of_its_command(tmp_path, capsys):
    older = [row("ring", 1.0, samples_per_pack=None)]
    assert beside(tmp_path, older, *SMALL, "--samples", str(SAMPLES)) == 0
    assert "| 1.00 " in capsys.readouterr().out
    assert beside(tmp_path, older, *SMALL) == 0  # 12 packs of a sample: less memory
    said = capsys.readouterr().out
    assert "0.500 |" not in said
    assert beside(tmp_path, older, *SMALL, "--samples", "5") == 2
    assert "12 samples of a step are no whole packs of 5: give --samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words", "sentence"),
    [
        ({}, ["--samples", "2"], "it has 3 samples a pack, and not --samples 2"),
        ({"samples_per_pack": 5}, [], "no whole packs of 5: as it says"),
        ({"samples_per_pack": 0}, [], "its samples_per_pack is 0"),
        ({"samples_per_pack": "3"}, [], "its samples_per_pack is '3'"),
        ({"world": 0}, [], "its world is 0"),
        ({"samples": -3}, [], "its samples is -3"),
        ({"world": 10**9}, [], "--gpus must be a number from 1 to 16,384"),
        ({"text_tokens": -1}, [], "--text-tokens must be a number from 0"),
        ({"model": "8b"}, [], "--model 8b is not one of 600m"),
        ({"precision": "fp16"}, [], "precision: input should be 'fp32' or 'bf16'"),
        ({"layout": "4 (data 4)"}, [], "is no layout that a plan knows"),
        ({"layout": "4 (data 4), ZeRO 1", "samples": 6}, [], "train.global_batch_packs=2 cannot be shared by 4"),
        ({"recompute": "half"}, [], "with recompute half it is no layout that a plan knows"),
        ({}, ["--nodes", "3"], "--gpus 4 cannot be shared evenly by --nodes 3"),
    ],
)
def test_rows_that_no_plan_is_of(changes, words, sentence, tmp_path, capsys):
    assert beside(tmp_path, [row("ring", 1.0, **changes)], *SMALL, *words) == 2
    assert sentence in capsys.readouterr().err


def test_rankings_are_compared_as_scipy_does():
    scipy_stats = pytest.importorskip("scipy.stats")
    pairs = [(1.0, 3.0), (2.0, 2.0), (2.0, 5.0), (4.0, 4.0), (9.0, 4.0)]
    assert spearman(pairs) == pytest.approx(scipy_stats.spearmanr(*zip(*pairs, strict=True)).statistic)
