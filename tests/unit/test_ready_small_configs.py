"""The ready runs on small sets: each opens, fits its set, and trains."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from lumina.config.load import dump_config, load_config
from lumina.data.recipes.digit_sheets import write_digit_sheets
from lumina.data.recipes.digits import write_digits
from lumina.data.recipes.moving_digits import write_moving_digits
from lumina.data.recipes.turntable import write_turntable
from lumina.data.write import write_shards
from tests.parallel.runs import metrics_of, train_on

CONFIGS = Path(__file__).parents[2] / "configs"
# Tokens of a sample: rows × (columns + a nextline), and a nextframe between two frames.
WORD, OBJECT, VIDEO = 20 * (12 + 1), 12 * 4 * (4 + 1) + 11, 4 * 4 * (4 + 1) + 3


def spectrogram(number):
    """As `lumina data speech` writes them, of noise."""
    values = np.random.default_rng(number).uniform(-1, 1, (1, 1, 2, 80, 48)).astype(np.float16)
    values[:, :, 1] = 0
    stream = io.BytesIO()
    np.save(stream, values)
    return {"__key__": f"s{number}", "latent.npy": stream.getvalue(), "txt": f"say the word {number}"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_digits(root / "digits")
    write_digit_sheets(root / "digit-sheets", count=24, workers=1)
    write_moving_digits(root / "moving-digits", count=24, workers=1)
    write_turntable(root / "turntable", count=24, workers=1)
    write_shards(root / "speech", map(spectrogram, range(24)), name="speech", samples_per_shard=24)
    return root


@pytest.mark.slow
def test_each_trains(sets, tmp_path):
    names = {
        "digits": 6,
        "digit-sheets": None,
        "moving-digits": VIDEO,
        "turntable": OBJECT,
        "speech": WORD,
        "four": None,
    }
    trees = []
    for name in names:
        config = load_config(CONFIGS / f"{name}.yaml", [f"run.dir={tmp_path / name}", "train.steps=2"])
        tree = yaml.safe_load(dump_config(config))
        for one in (tree["data"], *tree["data"]["sets"]):
            one["shards"] = [str(sets / Path(shards).name) for shards in one["shards"]]
        tree["train"]["tokens_per_pack"] = 1040  # a quarter of the work, in which two steps see every kind
        tree["preview"]["every"] = 2 if name == "four" else 0
        tree["preview"]["steps"] = 2
        tree["log"]["tensorboard"] = False
        trees.append(tree)
    train_on(1, *trees)
    for name, tokens in names.items():
        lines = metrics_of(tmp_path / name)
        assert len(lines) == 2
        assert all(math.isfinite(line["loss"]) and not line["skipped"] and not line["bad_samples"] for line in lines)
        if tokens is not None and name != "digits":
            assert all(line["tokens"] == line["samples"] * tokens for line in lines), name
    # A fresh model predicts zero, so that its loss is the mean square of data − noise: 1 + 1/3 of words of uniform
    # noise. Where padding counted as values, the words would have a third of it.
    assert metrics_of(tmp_path / "speech")[0]["loss"] == pytest.approx(4 / 3, rel=0.05)
    assert list((tmp_path / "four" / "previews").glob("*.png"))
