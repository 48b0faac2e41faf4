"""Adapters through peft: trained as a plain loop would, kept apart from the weights, merged and opened by others."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from lumina.checkpoint.load import Checkpoint, latest_checkpoint, model_config
from lumina.checkpoint.lora import LoraSource, pair_names
from lumina.cli import main
from lumina.config.load import validate
from lumina.inference.images import contact_sheet
from lumina.inference.pipeline import LuminaPipeline
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import forward_flops
from lumina.train.bits import Watch
from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_on, train_tree
from tests.unit.finetuning import batches, loss_of, opened

RANK, ALPHA, STEPS, HALF = 3, 6, 4, 2
# A plain loop adds up in another order.
CLOSE = {"rtol": 0, "atol": 2e-6}
LAYERS = [
    f"layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo", "wk_y", "wv_y")),
        *(f"feed_forward.{w}" for w in ("w1", "w2", "w3")),
    )
]


def lora_config(run_dir, digits, first, **changes):
    lora = {"rank": RANK, "alpha": ALPHA}
    return tiny_config(run_dir, digits, **({"train__init_from": str(first), "lora": lora} | changes))


def write(tmp_path, tree):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    """A run whose every weight was trained, its text gates too."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    train_tree(0, tiny_config(run_dir, digits, parallel__zero_stage=0))
    return run_dir


@pytest.fixture(scope="module")
def tuned(digits, first, tmp_path_factory):
    """Adapters beside it, with a checkpoint half-way."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    preview = {"every": STEPS, "prompts": ["one"], "height": 8, "width": 8, "steps": 2}
    train_tree(0, lora_config(run_dir, digits, first, checkpoint__every=HALF, preview=preview))
    return run_dir


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    assert main(["convert", str(tuned), str(folder), "--to", "peft"]) == 0
    return folder


def weights_of(run_dir, kind="master"):
    return {n.removeprefix(f"{kind}/"): v for n, v in tensors_of(run_dir).items() if n.startswith(f"{kind}/")}


def forward(model):
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 1, 8, 8, generator=draw), torch.tensor([0.2, 0.7])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        return model(x, t, torch.randn(2, 5, 16, generator=draw), mask)


def test_checkpoints_hold_adapters_and_the_run_the_weights_as_they_were(first, tuned):
    weights, held = weights_of(first), tensors_of(tuned)
    base = load_file(tuned / "base" / "model.safetensors")
    assert base.keys() == weights.keys()
    assert all(base[name].equal(weights[name]) for name in weights)
    names = {name for layer in LAYERS for name in pair_names(layer)}
    kinds = ("master", "ema", "exp_avg", "exp_avg_sq")
    assert held.keys() == {f"{kind}/{name}" for kind in kinds for name in names}
    trained = sum(value.numel() for name, value in held.items() if name.startswith("master/"))
    # dim 16, captions 16 wide, feed-forward 48: rank × (in + out) for six square layers and three of the feed-forward.
    assert trained == 2 * RANK * (6 * (16 + 16) + 3 * (16 + 48))
    assert sum(v.numel() for v in base.values()) > 5 * trained


class Plain(nn.Module):
    """W·x + alpha/rank · B·A·x, by hand."""

    def __init__(self, weight, a):
        super().__init__()
        self.register_buffer("weight", weight)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(torch.zeros(len(weight), len(a)))

    def forward(self, x):
        return x @ self.weight.T + ALPHA / RANK * (x @ self.a.T) @ self.b.T


def test_training_is_that_of_a_plain_loop(tmp_path, digits, first, tuned):
    """peft, DeepSpeed and our engine, beside twenty lines of torch on the same packs."""
    tree = lora_config(tmp_path / "unused", digits, first)
    data, objective, drawn = batches(tree, STEPS)
    model = FlagDiT(model_config(validate(tree, "test")))
    model.load_state_dict(weights_of(first))
    model.requires_grad_(False)
    for layer in LAYERS:
        parent, _, leaf = layer.rpartition(".")
        a, b = (drawn[name] for name in pair_names(layer))
        assert not b.any()
        assert 0 < a.abs().max() <= 1 / a.shape[1] ** 0.5  # the law that peft draws by
        setattr(model.get_submodule(parent), leaf, Plain(model.get_submodule(layer).weight.detach(), a))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5, weight_decay=0.0)
    for line, batch in zip(metrics_of(tuned), data, strict=True):
        loss = loss_of(model, objective, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(line["loss"], rel=1e-6)
        assert float(norm) == pytest.approx(line["grad_norm"], rel=1e-5)
        passes = [forward_flops(model.config, p.stretch.tokens.lengths, p.captions.lengths) for p in batch.packs]
        # The backward pass of a product with a frozen weight is one product, that of attention two.
        flops = sum(2 * one.gemm + 3 * one.attention for one in passes)
        assert line["tflops_per_device"] * line["seconds"] * 1e12 == pytest.approx(flops, rel=1e-9)
    found = weights_of(tuned)
    for layer in LAYERS:
        a, b = pair_names(layer)
        assert torch.allclose(found[a], model.get_submodule(layer).a, **CLOSE)
        assert torch.allclose(found[b], model.get_submodule(layer).b, **CLOSE)
        assert found[b].abs().max() > 1e-3  # far more than the tolerance


@pytest.mark.parametrize("kind", ["master", "ema"])
def test_merged_weights_are_w_and_the_product(tuned, first, kind):
    source, adapters, weights = LoraSource(latest_checkpoint(tuned)), weights_of(tuned, kind), weights_of(first)
    assert source.tensors[kind].keys() == weights.keys()
    for name, weight in weights.items():
        a, b = pair_names(name.removesuffix(".weight"))
        expected = weight.numpy()
        if a in adapters:
            product = adapters[b].numpy().astype(np.float64) @ adapters[a].numpy().astype(np.float64)
            expected = (expected.astype(np.float64) + ALPHA / RANK * product).astype(np.float32)
            assert not np.array_equal(expected, weight.numpy())
        # One rounding of fp64: at most a last bit, where the sum was on an edge.
        np.testing.assert_allclose(source.read(kind, name).numpy(), expected, rtol=1.2e-7, atol=0)


def test_every_way_to_the_merged_model_gives_one(tmp_path, first, tuned, exported):
    """The run itself, its merged export, its adapter over the base: the same numbers, and peft's own."""
    from peft import PeftModel

    merged = tmp_path / "merged"
    assert main(["convert", str(tuned), str(merged), "--to", "inference"]) == 0
    assert json.loads((merged / "conversion.json").read_text())["proof"]["weights"][0]["exact"]
    of_run = forward(LuminaPipeline.from_pretrained(tuned).model)
    assert forward(FlagDiT.from_pretrained(merged)).equal(of_run)
    base = LuminaPipeline.from_pretrained(first, weights="model")
    plain = forward(base.model)
    base.load_lora(exported)
    assert forward(base.model).equal(of_run)
    apart = (of_run - plain).abs().max()
    by_peft = PeftModel.from_pretrained(FlagDiT.from_pretrained(tuned / "base"), str(exported))
    assert torch.allclose(forward(by_peft), of_run, rtol=0, atol=1e-3 * float(apart))
    noise = [torch.Generator().manual_seed(0)]
    picture = LuminaPipeline.from_pretrained(merged)("one", 8, 8, num_inference_steps=2, generator=noise).images[0]
    with Image.open(tuned / "previews" / f"step_{STEPS:08d}.png") as preview:
        assert contact_sheet([picture], columns=1).tobytes() == preview.tobytes()


def test_a_scale_and_the_other_settings_of_an_adapter(tmp_path, first, exported):
    """lora_alpha, alpha_pattern and use_rslora, as peft reads them."""
    from peft import PeftModel

    half = LuminaPipeline.from_pretrained(first, weights="model")
    half.load_lora(exported, 0.5)
    pair = load_file(exported / "adapter_model.safetensors")
    a, b = (pair[f"base_model.model.{LAYERS[0]}.lora_{which}.weight"] for which in "AB")
    expected = weights_of(first)[f"{LAYERS[0]}.weight"] + 0.5 * ALPHA / RANK * b @ a
    assert torch.allclose(half.model.get_submodule(LAYERS[0]).weight, expected, **CLOSE)

    other = tmp_path / "other"
    shutil.copytree(exported, other)
    settings = json.loads((other / "adapter_config.json").read_text())
    settings |= {"use_rslora": True, "lora_alpha": 40, "alpha_pattern": {"wq": 90, r"layers\.1\.feed_forward\.w1": 5}}
    (other / "adapter_config.json").write_text(json.dumps(settings))
    ours = LuminaPipeline.from_pretrained(first, weights="model")
    plain = forward(ours.model)
    ours.load_lora(other)
    model = LuminaPipeline.from_pretrained(first, weights="model").model
    theirs = forward(PeftModel.from_pretrained(model, str(other)))
    assert torch.allclose(forward(ours.model), theirs, rtol=0, atol=1e-3 * float((theirs - plain).abs().max()))


def test_sampling_with_an_adapter(tmp_path, first, tuned, exported, capsys):
    options = ["--prompt", "one", "--height", "8", "--width", "8", "--steps", "2", "--out"]
    of_first = [str(first), "--weights", "model", *options]
    assert main(["sample", *of_first, str(tmp_path / "a"), "--lora", str(exported)]) == 0
    assert main(["sample", str(tuned), *options, str(tmp_path / "b")]) == 0
    assert main(["sample", *of_first, str(tmp_path / "c"), "--lora", str(exported), "--lora-scale", "30"]) == 0
    a, b, c = ((tmp_path / folder / "000000.png").read_bytes() for folder in "abc")
    assert a == b != c
    settings = json.loads((tmp_path / "c" / "samples.json").read_text())[0]["settings"]
    assert (settings["lora"], settings["lora_scale"]) == (str(exported), 30.0)
    assert main(["sample", *of_first, str(tmp_path / "d"), "--lora-scale", "2"]) == 2
    assert "--lora-scale 2.0 is of an adapter; name it by --lora DIR" in capsys.readouterr().err


def half_way(tuned, run_dir):
    """A copy of the run as it was after half of its steps."""
    shutil.copytree(tuned, run_dir, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}", "metrics.jsonl", "latest"))
    return run_dir


def test_a_resume_is_the_unbroken_run_to_the_last_bit(tmp_path, digits, tuned):
    """The model that the run started from is gone by then: its folder has what is needed."""
    run_dir = half_way(tuned, tmp_path / "run")
    train_tree(0, lora_config(run_dir, digits, tmp_path / "gone"))
    assert [line["loss"] for line in metrics_of(run_dir)] == [line["loss"] for line in metrics_of(tuned)[HALF:]]
    ours, theirs = tensors_of(run_dir), tensors_of(tuned)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@pytest.mark.slow
def test_under_any_layout(tmp_path, digits, first, tuned):
    """Two ranks, every ZeRO stage, a ring, Ulysses; and what one rank began two go on with."""
    layouts = [{"zero_stage": stage} for stage in range(4)] + [
        {"ring": 2, "zero_stage": 1},
        {"ulysses": 2, "zero_stage": 2, "offload_optimizer": True, "recompute": "selective"},
    ]
    trees = [lora_config(tmp_path / str(i), digits, first, parallel=how) for i, how in enumerate(layouts)]
    half_way(tuned, tmp_path / "resumed")
    trees.append(lora_config(tmp_path / "resumed", digits, first, parallel={"zero_stage": 3, "recompute": "full"}))
    trees.append(lora_config(tmp_path / "bf16", digits, first, precision="bf16", parallel={"zero_stage": 2}))
    train_on(2, *trees)
    expected, losses = tensors_of(tuned), [line["loss"] for line in metrics_of(tuned)]
    for run_dir in [tmp_path / str(i) for i in range(len(layouts))] + [tmp_path / "resumed"]:
        lines = metrics_of(run_dir)
        assert [line["loss"] for line in lines] == pytest.approx(losses[-len(lines) :], rel=1e-6)
        found = tensors_of(run_dir)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, **CLOSE), (run_dir.name, name)
    assert [line["loss"] for line in metrics_of(tmp_path / "bf16")] == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize("zero", [1, 3])
def test_frozen_weights_are_watched(tmp_path, digits, first, zero):
    """No optimizer would ever write over a bit that flips there."""
    with opened(lora_config(tmp_path / "run", digits, first, parallel__zero_stage=zero)) as trainer:
        watch = Watch(trainer.engine.held, every=1)
        watch.seal()
        assert watch.changed() == []
        name = "layers.1.feed_forward.w2.base_layer.weight"
        (held,) = [one for one in trainer.engine.held() if one.name == name]
        held.values.view(torch.int32)[5] ^= 1 << 20
        assert [(one.kind, one.name) for one in watch.changed()] == [("frozen", name)]


def test_chosen_layers(tmp_path, digits, first):
    """Names by their last parts; weights drawn by name: the same whichever others there are."""
    tree = lora_config(tmp_path / "run", digits, first, train__steps=1)
    tree["lora"] = {"rank": 2, "target_modules": ["attention.wq", "adaLN_modulation.1", "x_embedder"]}
    tree["train"]["learning_rate"] = 1e-30
    train_tree(0, tree)
    found = weights_of(tmp_path / "run")
    names = ["x_embedder", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.wq", "adaLN_modulation.1"))]
    names.append("final_layer.adaLN_modulation.1")
    assert found.keys() == {one for name in names for one in pair_names(name)}
    tree["lora"]["target_modules"] = r"layers\.1\..*w[qk]"
    tree["run"]["dir"] = str(tmp_path / "regexp")
    train_tree(0, tree)
    a = pair_names("layers.1.attention.wq")[0]
    again = weights_of(tmp_path / "regexp")
    assert again.keys() == {one for n in ("wq", "wk") for one in pair_names(f"layers.1.attention.{n}")}
    assert again[a].equal(found[a])
    assert not again[a].equal(again[pair_names("layers.1.attention.wk")[0]])


def test_what_starts_anew_is_trained_itself(tmp_path, digits, first, capsys):
    """Captions of another width, under adapters: the text branch is in the checkpoint, the rest in the base."""
    tree = lora_config(tmp_path / "run", digits, first, train__new_text_branch=True)
    tree["model"], tree["text"] = tree["model"] | {"cap_feat_dim": 24}, tree["text"] | {"width": 24}
    train_tree(0, tree)
    assert "layers: 1,920 parameters are trained; and all of cap_embedder.0.weight" in capsys.readouterr().err
    found, base = weights_of(tmp_path / "run"), load_file(tmp_path / "run" / "base" / "model.safetensors")
    anew = {name for name in found if ".lora_" not in name}
    branch = ("attention_y_norm.weight", "attention.wk_y.weight", "attention.wv_y.weight", "attention.gate",
              "attention.ky_norm.weight", "attention.ky_norm.bias")  # fmt: skip
    expected = {f"layers.{i}.{name}" for i in range(2) for name in branch}
    assert anew == expected | {"cap_embedder.0.weight", "cap_embedder.0.bias", "cap_embedder.1.weight"}
    assert base.keys() == weights_of(first).keys() - anew
    assert found["layers.0.attention.gate"].abs().min() > 0  # they are zero at first
    assert not any("_y." in name for name in found if ".lora_" in name)
    pipeline = LuminaPipeline.from_pretrained(tmp_path / "run", weights="model")
    assert pipeline.model.layers[0].attention.gate.equal(found["layers.0.attention.gate"])
    tree["train"]["steps"] = STEPS + 1
    train_tree(0, tree)
    assert metrics_of(tmp_path / "run")[-1]["step"] == STEPS + 1
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "adapter"), "--to", "peft"]) == 2
    assert "for which peft's format has no room; --to inference merges" in capsys.readouterr().err


def test_training_goes_on_from_the_merged_weights(tmp_path, digits, tuned):
    """All of them, as a run of its own or as one that starts from it."""
    assert main(["convert", str(tuned), str(tmp_path / "run"), "--to", "training"]) == 0
    merged = LoraSource(latest_checkpoint(tuned))
    whole = weights_of(tmp_path / "run")
    assert all(whole[name].equal(merged.read("master", name)) for name in whole)
    still = {"train__steps": 1, "train__learning_rate": 1e-30}
    train_tree(0, tiny_config(tmp_path / "next", digits, train__init_from=str(tuned), **still))
    found = weights_of(tmp_path / "next")
    assert all(torch.allclose(found[name], whole[name], rtol=0, atol=1e-7) for name in whole)
    train_tree(0, tiny_config(tmp_path / "run", digits, train__steps=STEPS + 1))
    assert metrics_of(tmp_path / "run")[0]["step"] == STEPS + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__init_from": None}, "lora trains adapters beside the weights of a model; name it by train.init_from"),
        ({"train__init_ema": True}, "lora averages its adapters, which begin anew; set it to false"),
        ({"parallel__tensor": 2}, "parallel.tensor=2 cuts the layers that lora puts adapters beside"),
        ({"parallel__pipeline": 2}, "with lora set parallel.pipeline=1"),
        ({"lora__target_modules": ["wqq"]}, "no layer is called wqq; did you mean wq?"),
        ({"lora__target_modules": ["q_norm"]}, "q_norm is a LayerNorm; adapters go beside linear layers alone"),
        ({"lora__target_modules": []}, "lora.target_modules is empty"),
        ({"lora__target_modules": "wq"}, "matches the whole name of no linear layer; they are named as layers."),
        ({"lora__target_modules": "w("}, "lora.target_modules='w(' is no regular expression"),
        ({"lora__rank": 0}, "lora.rank: input should be greater than or equal to 1"),
        ({"lora__dropout": 0.1}, "unknown key lora.dropout"),
    ],
)
def test_what_is_refused(tmp_path, digits, first, capsys, changes, message):
    tree = tiny_config(tmp_path / "run", digits, **({"train__init_from": str(first), "lora__rank": 2} | changes))
    assert main(["train", write(tmp_path, tree)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_doctor_counts_adapters(tmp_path, digits, first, capsys):
    path = write(tmp_path, lora_config(tmp_path / "run", digits, first))
    assert main(["doctor", path, "lora.rank=3000", "lora.alpha=null"]) == 0
    # Weights, average and two moments, fp32, of so many elements.
    trained = 2 * 3000 * (6 * (16 + 16) + 3 * (16 + 48))
    assert f"a checkpoint takes {16 * trained / 1e6:.1f} MB" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", path, "lora.target_modules=[wqq]"]) == 1
    assert "no layer is called wqq; did you mean wq?" in " ".join(capsys.readouterr().out.split())


def test_throughput_is_of_all_weights(capsys):
    assert main(["benchmark", "throughput", "--model", "600m", "train.init_from=x", "lora.rank=2"]) == 2
    assert "what is measured is the training of all weights: leave lora out" in capsys.readouterr().err


def test_without_peft(tmp_path, digits, first, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", write(tmp_path, lora_config(tmp_path / "run", digits, first))]) == 2
    assert "lora needs peft: pip install 'lumina-t2x[lora]'" in capsys.readouterr().err


def test_a_run_keeps_its_adapters_and_its_base(tmp_path, digits, first, tuned, capsys):
    run_dir = half_way(tuned, tmp_path / "run")
    other = lora_config(run_dir, digits, first, lora={"rank": RANK, "alpha": 1})
    assert main(["train", write(tmp_path, other)]) == 2
    assert f"lora.alpha=1.0, but {run_dir} was trained with 6.0" in capsys.readouterr().err
    assert main(["train", write(tmp_path, tiny_config(run_dir, digits))]) == 2
    assert f"lora.rank=None, but {run_dir} was trained with 3" in capsys.readouterr().err
    weights = run_dir / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["convert", str(run_dir), str(tmp_path / "a"), "--to", "inference"]) == 2
    assert "is damaged: it is not what adapters were trained beside (SHA-256)" in capsys.readouterr().err
    assert main(["train", write(tmp_path, lora_config(run_dir, digits, first))]) == 2
    shutil.rmtree(run_dir / "base")
    folder = run_dir / "checkpoints" / f"step_{HALF:08d}"
    with pytest.raises(ValueError, match="keep a run's folder together"):
        LoraSource(Checkpoint(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "adapter_config.json says use_dora=True; plain LoRA is what is read"),
        ({"modules_to_save": ["x_embedder"]}, r"says modules_to_save=\['x_embedder'\]"),
        ({"bias": "all"}, "says bias='all'"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "says peft_type 'LOHA'; LORA is what is read"),
        ("missing", "has no adapter_model.safetensors"),
        ("other layer", "is beside a layer layers.7.attention.wq, which this model does not have"),
        ("other shape", "does not fit this model: layers.0.attention.wq is .16, 16., and it is for .16, 5."),
        ("half", "its tensors of layers.0.attention.wq are no pair"),
        ("more", "its tensor base_model.model.x.weight .1, 1. is no A or B of a linear layer"),
        ("cut", "cannot be read as safetensors"),
    ],
)
def test_adapters_of_others_that_are_refused(tmp_path, first, exported, change, message):
    folder = tmp_path / "adapter"
    shutil.copytree(exported, folder)
    tensors = folder / "adapter_model.safetensors"
    held = load_file(exported / tensors.name)
    a, b = (f"base_model.model.layers.0.attention.wq.lora_{which}.weight" for which in "AB")
    if isinstance(change, dict):
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    elif change == "missing":
        tensors.unlink()
    elif change == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    else:
        if change == "other layer":
            held |= {name.replace("s.0.", "s.7."): held.pop(name) for name in (a, b)}
        elif change == "other shape":
            held[a] = torch.zeros(RANK, 5)
        elif change == "half":
            del held[b]
        else:
            held["base_model.model.x.weight"] = torch.zeros(1, 1)
        save_file(held, tensors)
    pipeline = LuminaPipeline.from_pretrained(first, weights="model")
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora(folder)
    assert all(value.equal(before[name]) for name, value in pipeline.model.state_dict().items())


def test_no_adapter_in_a_run_of_weights(tmp_path, first, capsys):
    assert main(["convert", str(first), str(tmp_path / "a"), "--to", "peft"]) == 2
    assert "has no adapters: --to peft is of runs with lora" in capsys.readouterr().err
    assert main(["convert", str(first), str(tmp_path / "a"), "--to", "peft", "--dtype", "bf16"]) == 2
    assert "--dtype does not go with --to peft" in capsys.readouterr().err
    pipeline = LuminaPipeline.from_pretrained(first)
    with pytest.raises(ValueError, match="is no adapter in peft's format"):
        pipeline.load_lora(Path(tmp_path))
