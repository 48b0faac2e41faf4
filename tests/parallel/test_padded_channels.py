"""Padded samples on several ranks: the run is that of one process."""

import io

import numpy as np
import pytest

from lumina.data.write import write_shards
from tests.parallel.runs import metrics_of, tiny_config, train_on


def moments(number, *shape):
    """A member of latents, deviation zero."""
    mean = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
    stream = io.BytesIO()
    np.save(stream, np.concatenate((mean, np.zeros_like(mean)), axis=1)[None])
    return stream.getvalue()


@pytest.mark.slow
def test_any_layout_trains_as_one_process(tmp_path):
    """Losses of four steps: those after the first depend on the gradients of the ones before."""
    shapes = ((1, 1, 8, 6), (1, 3, 4, 4), (2, 2, 4, 4), (1, 1, 6, 2))
    samples = [
        {"__key__": f"s{i:02d}", "latent.npy": moments(i, *shapes[i % 4]), "txt": f"sample {i % 5}"} for i in range(32)
    ]
    write_shards(tmp_path / "mixed", samples, name="mixed", samples_per_shard=16)

    def tree(name, **parallel):
        made = tiny_config(tmp_path / name, tmp_path / "mixed", parallel={"zero_stage": 0} | parallel)
        made["model"] = made["model"] | {"in_channels": 3, "frames": True}
        made["data"] = made["data"] | {"pad_channels": True, "frames": 2}
        return made

    train_on(1, tree("one"))
    train_on(2, tree("ring", ring=2), tree("pipeline", pipeline=2), tree("tensor", tensor=2), tree("data"))
    expected = [line["loss"] for line in metrics_of(tmp_path / "one")]
    # A fresh model predicts zero: the mean square of data − noise, both standard normal, over real values alone. With
    # the padding counted as zeros it would be about 1.17.
    assert expected[0] == pytest.approx(2.0, rel=0.15)
    assert len(set(expected)) == 4
    for name in ("ring", "pipeline", "tensor", "data"):
        lines = metrics_of(tmp_path / name)
        assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5), name
