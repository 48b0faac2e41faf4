"""Training goes on from what was converted."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_on
from tests.unit.converting import to, write_config

STEPS, MORE = 3, 5


@dataclass
class Runs:
    unbroken: Path
    copy: Path
    through_public: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits) -> Runs:
    """A run that goes on unbroken, as a converted copy of itself, and after a way through the public layout."""
    base = tmp_path_factory.mktemp("resume")
    runs = Runs(base / "run", base / "copy", base / "back")
    train_on(1, tiny_config(runs.unbroken, digits, train__steps=STEPS))
    to(runs.unbroken, runs.copy, "training")
    to(runs.unbroken, base / "public", "upstream", format="pth")
    to(base / "public", runs.through_public, "training", config=write_config(base / "config.yaml"))
    folders = (runs.unbroken, runs.copy, runs.through_public)
    train_on(1, *(tiny_config(folder, digits, train__steps=MORE) for folder in folders))
    return runs


@pytest.mark.slow
def test_a_copied_run_goes_on_as_the_unbroken_one(runs):
    unbroken, copy = (metrics_of(folder)[-2:] for folder in (runs.unbroken, runs.copy))
    assert [line["step"] for line in copy] == [4, 5]
    assert [line["loss"] for line in copy] == [line["loss"] for line in unbroken]
    ours, theirs = tensors_of(runs.unbroken), tensors_of(runs.copy)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []


@pytest.mark.slow
def test_weights_alone_are_trained_on_with_a_new_optimizer(runs):
    lines = metrics_of(runs.through_public)
    assert [line["step"] for line in lines] == [4, 5]
    # The data begin anew: the first pack of the run, which by now is known better.
    first, begun_anew = metrics_of(runs.unbroken)[0], lines[0]
    assert begun_anew["samples"] == first["samples"]
    assert 0 < begun_anew["loss"] < first["loss"]
    moved, before = tensors_of(runs.through_public), tensors_of(runs.unbroken)
    assert not moved["master/x_embedder.weight"].equal(before["master/x_embedder.weight"])
    # Adam's second moment is of two gradients, not of five.
    name = "exp_avg_sq/final_layer.linear.weight"
    assert moved[name].sum() < before[name].sum()
