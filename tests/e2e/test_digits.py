"""The whole of Lumina as a newcomer meets it: data, training, sampling, on real digits, judged by another model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.index import Index
from lumina.data.write import write_shards
from tests.e2e.recognition import draw_digits, verdict

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
STEPS = 350  # of the 600 that the configuration trains
PER_DIGIT = 20

pytestmark = pytest.mark.slow


def lumina(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lumina", *arguments], check=True)


def train(run_dir: Path, shards: Path, steps: int = STEPS, *overrides: str) -> None:
    lumina(
        "train",
        str(CONFIG),
        f"run.dir={run_dir}",
        f"data.shards=[{shards}]",
        f"train.steps={steps}",
        "preview.every=0",
        "log.tensorboard=false",
        *overrides,
    )


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "digits"
    train(run_dir, digits, STEPS, "preview.every=350", "log.tensorboard=true")
    return run_dir


def test_prompted_digits_are_recognised_and_new(trained):
    seen = verdict(*draw_digits(str(trained), guidance=2.5, steps=20, per_digit=PER_DIGIT))
    assert seen.judge_on_held_out_real > 0.98
    assert seen.recognised >= 0.90
    # Not copies: as far from the training images as real digits are from each other, and far from each other too.
    assert seen.copies < 0.05
    assert 0.8 < seen.nearest_training_median / seen.nearest_real_median < 1.7
    assert seen.between_seeds_median > 0.5 * seen.nearest_real_median


def test_shuffled_captions_leave_chance(digits, tmp_path):
    """The same run on pictures with the captions of others must draw what it was not asked for."""
    index = Index.open([digits])
    samples = [index.read(i) for i in range(len(index))]
    captions = np.random.default_rng(0).permutation([members["txt"] for members in samples])
    shuffled = tmp_path / "shuffled"
    write_shards(
        shuffled,
        (
            {"__key__": f"s{i:05d}", "png": members["png"], "txt": bytes(caption).decode()}
            for i, (members, caption) in enumerate(zip(samples, captions, strict=True))
        ),
        name="shuffled",
        samples_per_shard=500,
    )
    train(tmp_path / "run", shuffled, 200)  # after which right captions are heeded by three pictures in four
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < 0.7  # it has learned pictures, and not what to draw for whom
    seen = verdict(*draw_digits(str(tmp_path / "run"), guidance=2.5, steps=20, per_digit=PER_DIGIT))
    assert seen.recognised < 0.25


def test_what_a_run_leaves_behind(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.6 < lines[0]["loss"]
    assert all(line["tokens"] <= 1280 and line["samples"] == 64 for line in lines)
    assert (trained / "config.yaml").is_file()
    assert (trained / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").is_file()
    assert list((trained / "tensorboard").glob("events*"))
    preview = Image.open(trained / "previews" / f"step_{STEPS:08d}.png")
    assert np.asarray(preview).std() > 50


def test_sampling_from_the_command_line(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten digit three\n\nthe number 8\n")
    arguments = ["--height", "8", "--width", "8", "--count", "2", "--steps", "10", "--seed", "5"]
    outputs = []
    for name, batch_size in (("a", "3"), ("b", "1")):
        out = tmp_path / name
        lumina("sample", str(trained), "--prompts-file", str(prompts), "--out", str(out), "--batch-size", batch_size,
               *arguments)  # fmt: skip
        outputs.append(out)
    records = json.loads((outputs[0] / "samples.json").read_text())
    assert [(r["file"], r["prompt"], r["seed"]) for r in records] == [
        ("000000.png", "a handwritten digit three", 5),
        ("000001.png", "a handwritten digit three", 6),
        ("000002.png", "the number 8", 7),
        ("000003.png", "the number 8", 8),
    ]
    assert all(record["settings"]["steps"] == 10 for record in records)
    pictures = [[np.asarray(Image.open(out / r["file"])).astype(int) for r in records] for out in outputs]
    assert all(picture.shape == (8, 8) for picture in pictures[0])
    # A sample does not depend on the others of its batch: but for the rounding of a grey level.
    assert max(np.abs(a - b).max() for a, b in zip(*pictures, strict=True)) <= 1
    assert np.abs(pictures[0][0] - pictures[0][1]).max() > 20
    assert (outputs[0] / "sheet.png").is_file()


def test_the_same_seed_gives_the_same_losses_and_another_does_not(digits, tmp_path):
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, digits, 3, f"run.seed={seed}")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["a"] == losses["b"] != losses["c"]
