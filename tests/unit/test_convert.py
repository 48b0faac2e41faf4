"""Conversions between our own layouts: nothing changes on the way, and what cannot be asked for is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lumina.checkpoint.load import Checkpoint, latest_checkpoint
from lumina.checkpoint.manifest import write_manifest
from lumina.config.load import load_config
from lumina.config.schema import TrainConfig
from lumina.inference.pipeline import LuminaPipeline
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.train.initial import Start
from tests.unit.converting import (
    KINDS,
    OPTIMIZER_STEPS,
    STEP,
    assert_equal,
    tensors_of,
    to,
    write_config,
    write_public,
    write_run,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and what is in its checkpoint."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    return folder, write_run(folder)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Round trips.


@pytest.mark.parametrize(
    "options", [{}, {"format": "pth"}, {"model_parallel": 2}, {"model_parallel": 2, "format": "pth"}]
)
def test_to_the_public_layout_and_back(tmp_path, run, options):
    folder, values = run
    there = to(folder, tmp_path / "public", "upstream", **options)
    parts, suffix = options.get("model_parallel", 1), options.get("format", "safetensors")
    stems = [f"{i:02d}-of-{parts:02d}.{suffix}" for i in range(parts)]
    expected = [f"{which}.{stem}" for which in ("consolidated", "consolidated_ema") for stem in stems]
    assert files_in(tmp_path / "public") == sorted([*expected, "conversion.json", "model_args.pth"])
    assert all(proof.exact for proof in there.proofs)
    assert ("model-parallel" in " ".join(there.notes)) == (parts == 2)
    to(tmp_path / "public", tmp_path / "back", "training", config=write_config(tmp_path / "config.yaml"))
    found = tensors_of(tmp_path / "back")
    assert list(found) == ["master", "ema"]
    assert_equal(found["master"], values["master"])
    assert_equal(found["ema"], values["ema"])
    checkpoint = latest_checkpoint(tmp_path / "back")
    assert (checkpoint.manifest.step, checkpoint.manifest.optimizer_steps) == (STEP, 0)
    assert checkpoint.model == latest_checkpoint(folder).model


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_to_an_inference_folder_and_back(tmp_path, run, weights):
    folder, values = run
    kind = {"ema": "ema", "model": "master"}[weights]
    to(folder, tmp_path / "inference", "inference", weights=weights)
    assert_equal(FlagDiT.from_pretrained(tmp_path / "inference").state_dict(), values[kind])
    back = to(tmp_path / "inference", tmp_path / "back", "training")
    found = tensors_of(tmp_path / "back")
    assert_equal(found["master"], values[kind])
    assert_equal(found["ema"], values[kind])
    assert latest_checkpoint(tmp_path / "back").manifest.step == STEP
    assert any("has no" in note for note in back.notes)


def test_a_run_to_a_run_keeps_everything(tmp_path, run):
    folder, values = run
    done = to(folder, tmp_path / "copy", "training")
    found, before, after = (
        tensors_of(tmp_path / "copy"),
        latest_checkpoint(folder),
        latest_checkpoint(tmp_path / "copy"),
    )
    assert list(found) == list(KINDS)
    for kind in KINDS:
        assert_equal(found[kind], values[kind])
    assert after.manifest.data == before.manifest.data
    assert (after.manifest.step, after.manifest.optimizer_steps) == (STEP, OPTIMIZER_STEPS)
    assert after.config == load_config(tmp_path / "copy" / "config.yaml")
    assert after.config.run.dir == str(tmp_path / "copy")
    assert after.config.model_copy(update={"run": before.config.run}) == before.config
    assert done.moments == 2 * len(values["exp_avg"])


def test_a_run_of_labels(tmp_path):
    model = {
        "patch_size": 2,
        "in_channels": 1,
        "dim": 24,
        "n_layers": 1,
        "n_heads": 3,
        "multiple_of": 8,
        "num_classes": 5,
    }
    values = write_run(tmp_path / "run", model=model, text=None)
    to(tmp_path / "run", tmp_path / "public", "upstream", weights="model")
    assert not (tmp_path / "public" / "consolidated_ema.00-of-01.safetensors").exists()
    to(tmp_path / "public", tmp_path / "inference", "inference")
    # The heads are in no tensor, and of no public size.
    loaded = FlagDiT.from_pretrained(tmp_path / "inference")
    assert loaded.config == FlagDiTConfig.from_dict(model)
    assert_equal(loaded.state_dict(), values["master"])


# The inference folder.


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_dtype_that_was_asked_for(tmp_path, run, dtype, torch_dtype):
    folder, values = run
    done = to(folder, tmp_path / "inference", "inference", dtype=dtype)
    found = load_file(tmp_path / "inference" / "model.safetensors")
    assert_equal(found, {name: value.to(torch_dtype) for name, value in values["ema"].items()})
    (proof,) = done.proofs
    # As large as rounding, and no larger than a few of its units.
    roundoff = {"bf16": 2.0**-8, "fp16": 2.0**-11}[dtype]
    assert not proof.exact
    assert roundoff / 10 < proof.worst < 4 * roundoff
    assert proof.tolerance == 16 * roundoff


def test_files_of_at_most_so_many_bytes(tmp_path, run):
    folder, values = run
    to(folder, tmp_path / "inference", "inference", shard_size=20_000)
    files = sorted((tmp_path / "inference").glob("model-*-of-*.safetensors"))
    tensors = {file.name: load_file(file) for file in files}
    assert len(files) > 3
    assert all(sum(v.nbytes for v in held.values()) <= 20_000 or len(held) == 1 for held in tensors.values())
    index = json.loads((tmp_path / "inference" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, held in tensors.items() for key in held}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values["ema"].values())
    assert_equal(FlagDiT.from_pretrained(tmp_path / "inference").state_dict(), values["ema"])


def test_an_inference_folder_draws_as_the_run_does(tmp_path, run):
    folder, _ = run
    to(folder, tmp_path / "inference", "inference")
    drawn = []
    for directory in (folder, tmp_path / "inference"):
        pipeline = LuminaPipeline.from_pretrained(directory, device="cpu")
        generator = torch.Generator().manual_seed(1)
        drawn.append(pipeline("two", height=4, width=4, num_inference_steps=2, generator=generator).latents)
    assert torch.equal(*drawn)


def test_the_card_says_what_is_known(tmp_path, run):
    folder, values = run
    lines = [
        {"step": n, "samples": 10, "tokens": 100, "loss": loss} for n, loss in ((1, 9.0), (6, 1.5), (7, 0.5), (8, 99.0))
    ]
    # Step 6 was taken again after a kill cut the line of step 7 off.
    written = [json.dumps(line) for line in (*lines[:2], lines[1], *lines[2:])]
    (folder / "metrics.jsonl").write_text("\n".join([*written[:2], '{"step": 7, "lo', *written[2:]]))
    to(folder, tmp_path / "two", "inference", dtype="bf16")
    (folder / "metrics.jsonl").unlink()
    card = (tmp_path / "two" / "README.md").read_text()
    parameters = sum(value.numel() for value in values["ema"].values())
    for words in (
        f"| parameters | {parameters:,} |",
        "| weights | exponential moving average, bf16 |",
        "| trained for | 7 steps, 30 samples, 300 tokens |",
        f"| training loss | {(9.0 + 1.5 + 0.5) / 3:.6f} ",
        "| flow | linear path, velocity prediction |",
        "| text encoder | bytes, ",
        "| data | `shards` |",
        "torch ",
        'lumina sample two --prompt "',
    ):
        assert words in card


def test_the_record_says_what_was_done(tmp_path, run):
    folder, _ = run
    to(folder, tmp_path / "inference", "inference", dtype="bf16")
    record = json.loads((tmp_path / "inference" / "conversion.json").read_text())
    assert (
        record["source"]["files"]
        == json.loads((latest_checkpoint(folder).directory / "manifest.json").read_text())["files"]
    )
    assert sorted(record["files"]) == ["config.json", "model.safetensors"]
    assert (record["dtype"], record["kinds"], record["source"]["step"]) == ("bf16", {"ema": "ema"}, STEP)
    (proof,) = record["proof"]["weights"]
    assert [block["block"] for block in proof["blocks"]] == ["embedders", "layers.0", "layers.1", "final_layer"]
    assert all(0 < block["relative_error"] < proof["tolerance"] for block in proof["blocks"])
    to(folder, tmp_path / "unproven", "inference", verify=False)
    assert json.loads((tmp_path / "unproven" / "conversion.json").read_text())["proof"] is None


@pytest.mark.parametrize(("target", "weights"), [("inference", "model"), ("upstream", "consolidated_ema.00-of-01")])
def test_a_file_that_changed_after_a_conversion_is_named(tmp_path, run, target, weights):
    """By all that open the folder; where another model is saved over it, that one is meant."""
    folder = tmp_path / target
    to(run[0], folder, target)
    model, path = FlagDiT.from_pretrained(folder), folder / f"{weights}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = pytest.raises(ValueError, match=rf"{weights}.safetensors is damaged: .*SHA-256 differs")
    with damaged:
        to(folder, tmp_path / "again", "inference")
    with damaged:
        FlagDiT.from_pretrained(folder)
    with torch.device("meta"):
        drawn = FlagDiT(model.config)
    with damaged:
        Start(TrainConfig(steps=1, init_from=str(folder)), drawn)
    if target == "inference":
        model.save_pretrained(folder)
        assert FlagDiT.from_pretrained(folder).config == model.config
    assert [path.name for path in tmp_path.iterdir()] == [target]


# Frames.


@pytest.fixture(scope="module")
def frames_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames") / "run"
    sizes = {"patch_size": 2, "in_channels": 1, "dim": 16, "n_layers": 1, "n_heads": 2, "multiple_of": 16}
    return folder, write_run(folder, model=sizes | {"cap_feat_dim": 16, "frames": True}), sizes | {"cap_feat_dim": 16}


def test_frames_are_dropped_by_name_alone(tmp_path, frames_run):
    folder, values, sizes = frames_run
    with pytest.raises(ValueError, match=r"has a nextframe_token.*--drop nextframe_token"):
        to(folder, tmp_path / "public", "upstream")
    to(folder, tmp_path / "public", "upstream", drop=["nextframe_token"])
    expected = {name: value for name, value in values["ema"].items() if name != "nextframe_token"}
    loaded = FlagDiT.from_pretrained(tmp_path / "public")
    assert_equal(loaded.state_dict(), expected)
    assert loaded.config == FlagDiTConfig.from_dict(sizes)
    record = json.loads((tmp_path / "public" / "conversion.json").read_text())
    assert record["dropped"] == ["nextframe_token"]
    to(folder, tmp_path / "run", "training", drop=["next*"])
    assert latest_checkpoint(tmp_path / "run").config.model["frames"] is False
    assert not any("nextframe_token" in held for held in tensors_of(tmp_path / "run").values())


def test_frames_are_begun_where_the_configuration_asks_for_them(tmp_path, run):
    folder, values = run
    sizes = {"patch_size": 2, "in_channels": 1, "dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
    config = write_config(tmp_path / "c.yaml", model=sizes | {"cap_feat_dim": 16, "frames": True})
    done = to(folder, tmp_path / "run", "training", config=config)
    found = tensors_of(tmp_path / "run")
    assert any("nextframe_token: it is initialised" in note for note in done.notes)
    assert torch.equal(found["master"]["nextframe_token"], found["ema"]["nextframe_token"])
    assert 0.005 < float(found["master"]["nextframe_token"].std()) < 0.05
    assert not found["exp_avg"].pop("nextframe_token").any()
    assert_equal(found["exp_avg"], values["exp_avg"])


# What is refused.


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("training", {"dtype": "bf16"}, "--dtype does not go with --to training; it is of --to inference and upstream"),
        ("training", {"weights": "ema"}, "--weights does not go with --to training"),
        ("upstream", {"shard_size": 10}, "--shard-size does not go with --to upstream; it is of --to inference"),
        ("inference", {"model_parallel": 2}, "--model-parallel does not go with --to inference"),
        ("inference", {"format": "pth"}, "--format does not go with --to inference"),
        ("inference", {"dtype": "fp8"}, "--dtype is 'fp8'; it is one of fp32, bf16, fp16"),
        ("inference", {"shard_size": 0}, "--shard-size is 0; it must be at least 1"),
        ("somewhere", {}, "--to is 'somewhere'; it is one of inference, upstream, training"),
        ("upstream", {"model_parallel": 4}, "--model-parallel 4 does not divide the 2 heads"),
        ("inference", {"drop": ["layers.*.w9"]}, "--drop layers.*.w9 fits no tensor"),
        ("inference", {"drop": ["eol_token"]}, "does not fit the model: missing eol_token"),
    ],
)
def test_options_that_do_not_fit(tmp_path, run, target, options, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        to(run[0], tmp_path / "new" / "out", target, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path, run):
    (tmp_path / "out").mkdir()
    to(run[0], tmp_path / "out", "inference")  # an empty one is taken
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="out is not an empty folder"):
        to(run[0], tmp_path / "out", "inference")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not an empty folder"):
        to(run[0], tmp_path / "file", "inference")
    assert files_in(tmp_path) == sorted([*before, "file"])


@pytest.mark.parametrize("what", ["none", "empty", "run", "unfinished"])
def test_what_is_no_model(tmp_path, what):
    folder = tmp_path / what
    words = {
        "none": "no such folder",
        "empty": "holds no model: no manifest.json",
        "run": "is a run without a complete checkpoint yet",
        "unfinished": "has a config.json but no model",
    }[what]
    if what != "none":
        folder.mkdir()
    if what == "run":
        (folder / "config.yaml").write_text("")
    if what == "unfinished":
        (folder / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=words):
        to(folder, tmp_path / "out", "inference")


def test_weights_that_are_not_there(tmp_path, run):
    to(run[0], tmp_path / "inference", "inference", weights="model")
    with pytest.raises(ValueError, match="has no ema weights; give --weights model, or leave it out"):
        to(tmp_path / "inference", tmp_path / "out", "upstream", weights="ema")


def test_a_configuration_of_another_model_is_refused(tmp_path, run):
    sizes = {"patch_size": 2, "in_channels": 1, "dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16}
    config = write_config(tmp_path / "c.yaml", model=sizes | {"cap_feat_dim": 16})
    with pytest.raises(ValueError, match=r"says model.dim=32, but the model in .* has 16"):
        to(run[0], tmp_path / "out", "training", config=config)


def test_without_a_configuration_the_sizes_are_known_and_the_rest_is_asked_for(tmp_path, run):
    folder, values = run
    to(folder, tmp_path / "public", "upstream")
    done = to(tmp_path / "public", tmp_path / "run", "training")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint.model == latest_checkpoint(folder).model
    with pytest.raises(ValueError, match=r"has no config.yaml: .* --config CONFIG"):
        _ = checkpoint.config
    assert any("--config CONFIG" in note for note in done.notes)
    assert_equal(checkpoint.state_dict("ema"), values["ema"])
    with pytest.raises(ValueError, match=r"does not say which flow, .*--config CONFIG"):
        to(tmp_path / "run", tmp_path / "inference", "inference")
    to(tmp_path / "run", tmp_path / "inference", "inference", config=write_config(tmp_path / "c.yaml"))
    assert LuminaPipeline.from_pretrained(tmp_path / "inference").text_encoder.width == 16


def test_values_that_fp16_cannot_hold_and_such_as_are_none(tmp_path, run):
    to(run[0], tmp_path / "inference", "inference")
    model = FlagDiT.from_pretrained(tmp_path / "inference")
    for value, dtype, words in (
        (1e5, "fp16", r"eol_token has values up to 1e\+05, which fp16 cannot hold; convert to bf16 or fp32"),
        (float("nan"), "bf16", "eol_token holds values that are not finite"),
        (float("inf"), None, "eol_token holds values that are not finite"),
    ):
        with torch.no_grad():
            model.eol_token[3] = value
        folder = write_public(tmp_path / f"public-{value}", model.state_dict())
        with pytest.raises(ValueError, match=words):
            to(folder, tmp_path / "out", "inference", dtype=dtype)
        assert not list(tmp_path.glob("*out*"))


def test_sizes_are_in_every_manifest(tmp_path):
    write_run(tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    manifest, folder = checkpoint.manifest, checkpoint.directory
    assert manifest.model == checkpoint.model.to_dict()
    older = replace(checkpoint.model, norm_eps=0.5)  # told by the manifest, not by config.yaml
    write_manifest(folder, manifest.model_copy(update={"model": older.to_dict()}))
    assert Checkpoint(folder).model == older
    write_manifest(folder, manifest.model_copy(update={"model": None}))
    assert Checkpoint(folder).model == checkpoint.model
