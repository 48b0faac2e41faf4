"""Folders of others: the public layout and the reference weights in it, and pickles that would run something."""

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lumina.checkpoint.load import latest_checkpoint
from lumina.checkpoint.torch_file import TorchFile
from lumina.cli import main
from lumina.inference.pipeline import LuminaPipeline
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import build
from tests.unit.converting import (
    assert_equal,
    assert_reference_outputs,
    reference_config,
    reference_state,
    tensors_of,
    to,
    write_public,
)

# As the public trainer says it, beside its layers: the dim that each of its parallel layers splits.
COLUMN = re.compile(
    r"\.(wq|wk|wv|wk_y|wv_y|w1|w3)\.weight$|^x_embedder\.|^cap_embedder\.1\.|^t_embedder\.mlp\.0\.|adaLN_modulation"
    r"|^final_layer\.linear|(q_norm|k_norm|ky_norm)\.|\.gate$"
)
ROW = re.compile(r"\.(wo|w2)\.weight$|^t_embedder\.mlp\.2\.weight$")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["consolidated", "consolidated_ema"])
def test_reference_weights_give_the_reference_outputs_after_every_conversion(tmp_path, name, suffix):
    """public → inference → public of the other suffix → training → inference; equal all along, as fp32 is."""
    state = reference_state()
    public = write_public(tmp_path / "0030000", state, f"{name}.00-of-01", suffix)
    other = {"pth": "safetensors", "safetensors": "pth"}[suffix]
    to(public, tmp_path / "1", "inference")
    to(tmp_path / "1", tmp_path / "2", "upstream", format=other)
    to(tmp_path / "2", tmp_path / "3", "training")
    assert (tmp_path / "2" / f"{name}.00-of-01.{other}").is_file()
    for folder in ("0030000", "1", "2"):
        model = FlagDiT.from_pretrained(tmp_path / folder)
        assert_equal(model.state_dict(), state)
        assert_reference_outputs(model)
    for kind in ("master", "ema"):
        model = build(reference_config(), tensors_of(tmp_path / "3")[kind], "3")
        assert_reference_outputs(model)
    # The step is in the name of the public folder, and stays with the model from there.
    assert latest_checkpoint(tmp_path / "3").manifest.step == 30_000


@pytest.mark.parametrize("how", ["an older torch", "an older file"])
def test_files_whose_tensors_have_no_places(tmp_path, monkeypatch, how):
    public = write_public(tmp_path / "public", reference_state())
    if how == "an older torch":
        monkeypatch.setattr("lumina.model.inert.torch_tells_places", lambda: False)
    else:
        file = public / "consolidated.00-of-01.pth"
        torch.save(reference_state(), file, _use_new_zipfile_serialization=False)
    to(public, tmp_path / "inference", "inference")
    assert_equal(FlagDiT.from_pretrained(tmp_path / "inference").state_dict(), reference_state())


def test_tensors_that_share_or_skip_memory(tmp_path):
    """Transposed, a slice, and two of one storage: values are read as they are meant."""
    state = reference_state()
    name = "layers.0.attention.wq.weight"
    both = torch.stack((state["eol_token"], state["pad_token"]), dim=1)
    spread = {name: state[name].T.contiguous().T, "eol_token": both[:, 0], "pad_token": both[:, 1]}
    assert not any(value.is_contiguous() for value in spread.values())
    public = write_public(tmp_path / "public", state | spread)
    to(public, tmp_path / "inference", "inference")
    assert_equal(FlagDiT.from_pretrained(tmp_path / "inference").state_dict(), state)


def test_rounded_weights_give_about_the_reference_outputs(tmp_path):
    public = write_public(tmp_path / "public", reference_state())
    done = to(public, tmp_path / "bf16", "inference", dtype="bf16")
    model = FlagDiT.from_pretrained(tmp_path / "bf16").float()
    with pytest.raises(AssertionError):
        assert_reference_outputs(model)
    assert_reference_outputs(model, tolerance=0.1)
    assert 1e-4 < done.proofs[0].worst < done.proofs[0].tolerance == 16 * 2.0**-8


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_split_as_the_public_trainer_splits(tmp_path, suffix):
    state = reference_state()
    public = write_public(tmp_path / "public", state)
    to(public, tmp_path / "two", "upstream", model_parallel=2, format=suffix)
    files = sorted((tmp_path / "two").glob(f"consolidated.*-of-02.{suffix}"))
    halves = [torch.load(file, weights_only=True) if suffix == "pth" else load_file(file) for file in files]
    assert len(halves) == 2
    split = 0
    for key, value in state.items():
        dim = 0 if COLUMN.search(key) else 1 if ROW.search(key) else None
        expected = [value] * 2 if dim is None else value.chunk(2, dim)
        split += dim is not None
        for half, part in zip(halves, expected, strict=True):
            assert torch.equal(half[key], part), key
    assert 0 < split < len(state)
    with pytest.warns(UserWarning, match="2 model-parallel ranks"):
        assert_equal(FlagDiT.from_pretrained(tmp_path / "two").state_dict(), state)


def test_the_arguments_are_a_namespace_of_plain_values(tmp_path):
    public = write_public(tmp_path / "public", reference_state())
    to(public, tmp_path / "out", "upstream", dtype="bf16")
    with torch.serialization.safe_globals([argparse.Namespace]):
        told = vars(torch.load(tmp_path / "out" / "model_args.pth", weights_only=True))
    assert {key: told[key] for key in ("qk_norm", "norm_eps", "precision", "model", "n_heads")} == {
        "qk_norm": True,
        "norm_eps": 1e-5,
        "precision": "bf16",
        "model": "DiT_Llama_Custom_patch2",
        "n_heads": reference_config().n_heads,
    }


def test_a_public_model_is_drawn_from_with_the_encoder_that_is_named(tmp_path):
    public = write_public(tmp_path / "public", reference_state())
    done = to(public, tmp_path / "inference", "inference")
    config = json.loads((tmp_path / "inference" / "config.json").read_text())
    assert config["vae"]["model"] == "stabilityai/sd-vae-ft-ema"
    assert "text" not in config
    assert "--text-encoder NAME" in (tmp_path / "inference" / "README.md").read_text()
    assert done.notes == []
    with pytest.raises(ValueError, match="does not say which text encoder"):
        LuminaPipeline.from_pretrained(tmp_path / "inference", device="cpu")


def test_pth_files_are_whole_archives_and_aligned(tmp_path):
    listed = {
        "a": (torch.bfloat16, (3, 5)),
        "b": (torch.float32, ()),
        "c": (torch.float16, (0, 2)),
        "d": (torch.float32, (7,)),
    }
    values = {key: torch.randn(shape).to(dtype) for key, (dtype, shape) in listed.items()}
    path = tmp_path / "x.pth"
    with TorchFile(path, listed) as file:
        for key, value in values.items():
            file.write(key, value)
        entry = file.close()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert entry.bytes == path.stat().st_size
    for mapped in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert_equal(loaded, values)
        assert [value.stride() for value in loaded.values()] == [value.stride() for value in values.values()]
        assert all(value.data_ptr() % 64 == 0 for value in loaded.values() if value.numel())


def test_a_pth_file_that_was_not_finished_is_none(tmp_path):
    with TorchFile(tmp_path / "x.pth", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}) as file:
        file.write("a", torch.ones(2))
        with pytest.raises(AssertionError, match="lacks b"):
            file.close()
    public = tmp_path / "consolidated.00-of-01.pth"
    (tmp_path / "x.pth").rename(public)
    with pytest.raises(ValueError, match=r"consolidated.00-of-01.pth: refused, it is damaged"):
        to(tmp_path, tmp_path / "out", "inference")


# What runs nothing, and is refused by name.


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FILES = ["consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth", "model_args.pth"]


@pytest.mark.parametrize("where", FILES)
@pytest.mark.parametrize("how", ["torch.save", "pickle.dump"])
@pytest.mark.parametrize("target", ["inference", "training"])
def test_no_pickle_runs(tmp_path, where, how, target):
    trace = tmp_path / "ran"
    public = write_public(tmp_path / "public", reference_state())
    contents = {"eol_token": torch.zeros(3), "more": Payload(trace)}
    if how == "torch.save":
        torch.save(contents, public / where)
    else:
        (public / where).write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(ValueError, match=f"{where}: refused, it is damaged or holds more than weights and settings"):
        to(public, tmp_path / "out", target)
    assert not trace.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["public"]
    pickle.loads(pickle.dumps(Payload(trace)))  # noqa: S301 - the payload is a live one
    assert trace.exists()


def test_what_a_pickle_names_is_told(tmp_path):
    public = write_public(tmp_path / "public", reference_state())
    torch.save({"more": zipfile.ZipInfo("x")}, public / FILES[0])
    with pytest.raises(ValueError, match=r"\(it names zipfile\.ZipInfo\)"):
        to(public, tmp_path / "out", "inference")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["integers", "missing", "shape", "unexpected", "cut"])
def test_tensors_that_do_not_fit(tmp_path, damage, suffix):
    state = reference_state()
    words = {
        "integers": "eol_token is int64; weights are float32, bfloat16 or float16",
        "missing": "does not fit the model: missing eol_token",
        "shape": r"eol_token is \(3,\) instead of",
        "unexpected": r"unexpected more \(--drop leaves it out\)",
        "cut": "refused, it is damaged" if suffix == "pth" else "cannot be read as safetensors",
    }[damage]
    changed = {"integers": torch.zeros(64, dtype=torch.int64), "shape": torch.zeros(3)}.get(damage)
    if changed is not None:
        state["eol_token"] = changed
    if damage == "missing":
        del state["eol_token"]
    if damage == "unexpected":
        state["more"] = torch.zeros(2)
    public = write_public(tmp_path / "public", state, suffix=suffix)
    if damage == "cut":
        path = public / f"consolidated.00-of-01.{suffix}"
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=words) as caught:
        to(public, tmp_path / "out", "inference")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["public"]
    if damage == "unexpected":
        to(public, tmp_path / "out", "inference", drop=["more"])
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert "more" not in file.keys()  # noqa: SIM118


# The command line.


def test_the_command_says_what_it_did(tmp_path, capsys):
    public = write_public(tmp_path / "public", reference_state())
    assert main(["convert", str(public), str(tmp_path / "out"), "--to", "inference", "--dtype", "bf16"]) == 0
    said = capsys.readouterr()
    assert "parameters of step 0, master in bf16, 2 files" in said.out
    proven = f"proof of master: {len(reference_state())} tensors as in the source; outputs of each block within"
    assert re.search(rf"{proven} \S+ \(allowed 6.2e-02\)", said.out)
    assert said.err == ""
    assert main(["convert", str(public), str(tmp_path / "two"), "--to", "upstream", "--model-parallel", "2"]) == 0
    assert "lumina convert: note: in 2 model-parallel files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("PUBLIC OUT --to inference --shard-size many", 2),
        ("PUBLIC OUT --to training --dtype bf16", 2),
        ("PUBLIC PUBLIC --to inference", 2),
        ("NONE OUT --to inference", 2),
        ("PUBLIC OUT --to inference --config NONE", 2),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, words, code):
    public = write_public(tmp_path / "public", reference_state())
    places = {"PUBLIC": str(public), "OUT": str(tmp_path / "out"), "NONE": str(tmp_path / "none")}
    assert main(["convert", *(places.get(word, word) for word in words.split())]) == code
    said = capsys.readouterr().err
    assert said.startswith("lumina convert: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["public"]
