"""Training that starts from public or own weights: what fits is as it was, what does not is named and allowed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lumina.cli import main
from lumina.inference.pipeline import LuminaPipeline
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from tests.parallel.runs import TINY_MODEL, metrics_of, tensors_of, tiny_config, train_tree
from tests.unit.converting import to
from tests.unit.finetuning import batches, loss_of

# Steps that change nothing, so that what a run starts from is what it saves.
STILL = {"train__steps": 1, "train__learning_rate": 1e-30}
WIDER = {"model": TINY_MODEL | {"cap_feat_dim": 24}, "text": {"encoder": "bytes", "width": 24, "max_tokens": 8}}


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A public folder of random weights, none of which is as it is drawn."""
    torch.manual_seed(5)
    model = FlagDiT(FlagDiTConfig(**TINY_MODEL, cap_feat_dim=16))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("public") / "0030000"
    folder.mkdir()
    save_file(model.state_dict(), folder / "consolidated.00-of-01.safetensors")
    return folder


def start(tmp_path, digits, source, *arguments, **changes):
    tree = tiny_config(tmp_path / "run", digits, **({"train__init_from": str(source)} | STILL | changes))
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    return main(["train", str(path), *arguments])


@pytest.mark.parametrize("kind", ["public", "inference", "run", "checkpoint"])
def test_the_first_loss_is_that_of_the_model(tmp_path, digits, public, kind):
    source = public
    if kind == "inference":
        FlagDiT.from_pretrained(public).save_pretrained(source := tmp_path / kind)
    elif kind in ("run", "checkpoint"):
        config = tmp_path / "of.yaml"
        config.write_text(json.dumps(tiny_config(tmp_path, digits)))
        to(public, tmp_path / "source", "training", config=config)
        source = tmp_path / "source" / ("" if kind == "run" else "checkpoints/step_00030000")
    tree = tiny_config(tmp_path / "run", digits, train__init_from=str(source))
    (batch,), objective, _ = batches(tree, 1)
    assert not (tmp_path / "run").exists()
    train_tree(0, tree)
    with torch.no_grad():
        expected = float(loss_of(FlagDiT.from_pretrained(public), objective, batch))
        drawn = float(loss_of(FlagDiT(FlagDiTConfig(**TINY_MODEL, cap_feat_dim=16)), objective, batch))
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert abs(drawn - expected) > 0.01 * expected
    assert losses[-1] < losses[0]  # weights so wild are soon better


def test_captions_of_another_width_start_silent(tmp_path, digits, public, capsys):
    """Beside a model made by hand: the public one, deaf to any caption."""
    assert start(tmp_path, digits, public, **WIDER) == 2
    said = capsys.readouterr().err
    assert "Its captions are 16 wide, and model.cap_feat_dim is 24: train.new_text_branch=true starts anew" in said
    assert start(tmp_path, digits, public, **WIDER, train__new_text_branch=True) == 0
    said = capsys.readouterr().err
    assert "the text branch starts anew, its gates at zero: cap_embedder.0.weight, cap_embedder.0.bias, " in said
    found, given = tensors_of(tmp_path / "run"), FlagDiT.from_pretrained(public).state_dict()
    deaf = FlagDiT(FlagDiTConfig(**TINY_MODEL, cap_feat_dim=24))
    branch = ("cap_embedder.0.", "cap_embedder.1.weight", "_y.weight", "_y_norm", ".ky_norm", ".gate")
    with torch.no_grad():
        for name, parameter in deaf.named_parameters():
            if any(part in name for part in branch):
                silent = name.endswith(("gate", "cap_embedder.1.weight"))
                parameter.fill_(0.0) if silent else parameter.normal_()  # whatever it is, it must not matter
                changed = name.endswith(("gate", "ky_norm.weight")) or parameter.shape != given[name].shape
                assert not changed or not torch.equal(found[f"master/{name}"], given[name])
            else:
                parameter.copy_(given[name])
                assert torch.allclose(found[f"master/{name}"], given[name], rtol=0, atol=1e-7), name
    tree = tiny_config(tmp_path / "other", digits, **WIDER, train__init_from=str(public), train__new_text_branch=True)
    (batch,), objective, _ = batches(tree, 1)
    with torch.no_grad():
        expected = float(loss_of(deaf, objective, batch))
    train_tree(0, tree)
    assert metrics_of(tmp_path / "other")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    # It learns to hear: first the gates and the pooled captions, then what is behind them.
    heard = tensors_of(tmp_path / "other")
    assert heard["master/layers.0.attention.gate"].abs().min() > 0
    assert heard["master/cap_embedder.1.weight"].abs().max() > 1e-3
    assert not heard["master/layers.0.attention.wv_y.weight"].equal(found["master/layers.0.attention.wv_y.weight"])


def test_captions_of_another_encoder_of_the_same_width(tmp_path, digits, public):
    """Asked for, not needed: the shapes would fit."""
    assert start(tmp_path, digits, public, train__new_text_branch=True) == 0
    found, given = tensors_of(tmp_path / "run"), FlagDiT.from_pretrained(public).state_dict()
    assert found["master/layers.1.attention.gate"].abs().max() < 1e-20  # zero, and a step of 1e-30
    assert not torch.allclose(
        found["master/layers.1.attention.wk_y.weight"], given["layers.1.attention.wk_y.weight"], atol=0.1
    )
    assert found["master/cap_embedder.1.weight"].abs().max() < 1e-20
    assert torch.allclose(found["master/cap_embedder.0.weight"], torch.ones(16))
    assert torch.allclose(found["master/layers.0.attention_y_norm.weight"], torch.ones(16))
    assert torch.allclose(found["master/cap_embedder.1.bias"], given["cap_embedder.1.bias"], rtol=0, atol=1e-7)


def test_a_caption_branch_for_a_model_of_classes(tmp_path, digits, capsys):
    torch.manual_seed(0)
    FlagDiT(FlagDiTConfig(**TINY_MODEL, num_classes=10)).save_pretrained(tmp_path / "classes")
    assert start(tmp_path, digits, tmp_path / "classes", train__new_text_branch=True) == 2
    said = capsys.readouterr().err
    assert "missing eol_token; missing pad_token; unexpected y_embedder.embedding_table.weight." in said
    allow = [word for name in ("*_token", "y_embedder.*") for word in ("--allow-missing", name)]
    assert start(tmp_path, digits, tmp_path / "classes", *allow, train__new_text_branch=True) == 0
    assert "cap_embedder.1.bias" in capsys.readouterr().err


def test_other_latents(tmp_path, digits, public, capsys):
    model = TINY_MODEL | {"cap_feat_dim": 16, "in_channels": 3}
    assert start(tmp_path, digits, public, model=model) == 2
    said = capsys.readouterr().err
    assert "x_embedder.weight is (16, 4) instead of (16, 12)" in said
    assert "Its latents have 1 channels, and model.in_channels is 3: x_embedder.weight and final_layer.linear" in said
    allow = [word for name in ("x_embedder.weight", "final_layer.linear.*") for word in ("--allow-missing", name)]
    assert start(tmp_path, digits, public, *allow, model=model) == 0
    assert "x_embedder.weight, final_layer.linear.weight, final_layer.linear.bias" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_frames_for_a_model_of_images(tmp_path, digits, public, lora, capsys):
    """The token between frames is drawn, and trained even where little else is."""
    model = TINY_MODEL | {"cap_feat_dim": 16, "frames": True}
    more = {} if lora is None else {"lora": lora}
    assert start(tmp_path, digits, public, model=model, **more) == 0
    assert "nextframe_token is drawn: models of images have none" in capsys.readouterr().err
    found = tensors_of(tmp_path / "run")
    assert found["master/nextframe_token"].abs().max() > 0
    assert "exp_avg/nextframe_token" in found
    assert ("master/x_embedder.weight" in found) == (lora is None)


def test_resolution_stages_from_public_weights(tmp_path, digits, public):
    """8, then 16 pixels: 4 × 5 and 8 × 9 tokens a picture, a nextline token at the end of each row."""
    stages = [{"from_step": 0, "resolution": 8}, {"from_step": 3, "resolution": 16}]
    tree = tiny_config(tmp_path / "run", digits, train__init_from=str(public), data__stages=stages)
    train_tree(0, tree)
    lines = metrics_of(tmp_path / "run")
    assert [line["tokens"] / line["samples"] for line in lines] == [20, 20, 72, 72]
    # The longest of 64 patches, 16 rows of 4, at which samplers start to extrapolate.
    assert LuminaPipeline.from_pretrained(tmp_path / "run").trained_length == 16 * (4 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__init_from": None}, "and new_text_branch say how to start from train.init_from; set it"),
        ({"model": TINY_MODEL | {"num_classes": 10}, "text": None}, "this model is label-conditional and reads no"),
    ],
)
def test_a_new_text_branch_of_nothing(tmp_path, digits, public, capsys, changes, message):
    assert start(tmp_path, digits, public, **({"train__new_text_branch": True} | changes)) == 2
    assert message in capsys.readouterr().err
