"""What ranks that work on the same packs report and draw: as one process does, and once."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lumina.data.write import write_shards
from tests.parallel.runs import metrics_of, tiny_config, train_on

LAYOUTS = {
    "tensor": {"tensor": 2, "sequence": True, "zero_stage": 1},
    "pipeline": {"pipeline": 2, "zero_stage": 1},
    "ring": {"ring": 2, "zero_stage": 0},
    "ulysses": {"ulysses": 2, "zero_stage": 3},
    "data": {"zero_stage": 2},
}
BROKEN = {3, 11}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of two sizes, some of which do not decode."""
    draw = np.random.default_rng(0)

    def picture(number: int) -> bytes:
        if number in BROKEN:
            return b"\x89PNG\r\n\x1a\nnothing more"
        stream = io.BytesIO()
        pixels = draw.integers(0, 256, (8, 8 if number % 2 else 12), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    samples = [{"__key__": f"s{i:03d}", "png": picture(i), "txt": f"number {i}"} for i in range(40)]
    write_shards(folder, samples, name="mixed", samples_per_shard=100)
    return folder


def tree_of(run_dir, shards, parallel):
    preview = {"every": 2, "prompts": ["number 1"], "per_prompt": 2, "height": 8, "width": 8, "steps": 2}
    return tiny_config(run_dir, shards, parallel=parallel, preview=preview, data__bad_samples=0.5)


def left_behind(run_dir):
    """Metrics that do not depend on speed, lines of the ledgers, and the pictures."""
    keys = ("step", "samples", "tokens", "bad_samples", "epoch", "skipped")
    metrics = [{key: line[key] for key in keys} for line in metrics_of(run_dir)]
    ledgers = [json.loads(x) for path in run_dir.glob("bad_samples/*") for x in path.read_text().splitlines()]
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted(run_dir.glob("previews/*.png"))]
    # FLOPs of the step, up to the clock: tflops and tokens_per_second are over the same seconds.
    flops = [line["tflops_per_device"] / line["tokens_per_second"] for line in metrics_of(run_dir)]
    return metrics, sorted(ledgers, key=lambda line: line["key"]), pictures, flops


@pytest.mark.slow
def test_what_a_run_leaves_behind(shards, tmp_path):
    train_on(1, tree_of(tmp_path / "one", shards, {"zero_stage": 0}))
    train_on(2, *[tree_of(tmp_path / name, shards, layout) for name, layout in LAYOUTS.items()])
    metrics, ledger, pictures, flops = left_behind(tmp_path / "one")
    assert metrics[-1]["bad_samples"] == len(ledger) == len(BROKEN)
    assert len(pictures) == 2
    for name in LAYOUTS:
        found_metrics, found_ledger, found_pictures, found_flops = left_behind(tmp_path / name)
        if name == "data":  # in another epoch another rank may meet the same bad sample, and count and note it too
            for found, line in zip(found_metrics, metrics, strict=True):
                assert line["bad_samples"] <= found.pop("bad_samples") <= 2 * line["bad_samples"]
            assert [{k: v for k, v in line.items() if k != "bad_samples"} for line in metrics] == found_metrics
            assert {line["key"] for line in found_ledger} == {line["key"] for line in ledger}
        else:
            assert found_metrics == metrics, name
            assert found_ledger == ledger, name
        assert found_flops == pytest.approx([f / 2 for f in flops]), name  # of each of two devices
        for found, expected in zip(found_pictures, pictures, strict=True):
            assert np.abs(found - expected).max() <= 1, name  # a last bit of a weight may round a pixel the other way
            assert expected.std() > 1
