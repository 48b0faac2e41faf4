"""A new run that starts from another model's weights."""

import json

import pytest
import torch

from lumina.cli import main
from tests.parallel.runs import metrics_of, tensors_of, tiny_config, train_on


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    """A run of four steps, on whole pictures."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    train_on(1, tiny_config(run_dir, digits, parallel__zero_stage=0))
    return run_dir


def config_file(tmp_path, tree):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    return str(path)


def frozen(tree):
    """A step that changes nothing, so that what a run starts from is what it saves."""
    tree["train"] |= {"steps": 1, "learning_rate": 1e-30, "ema_decay": 0.999}
    return tree


def started(tmp_path, digits, first, *arguments, **changes):
    """Exit code, and the tensors of a run that started from the first."""
    tree = frozen(tiny_config(tmp_path / "second", digits, train__init_from=str(first), **changes))
    code = main(["train", config_file(tmp_path, tree), *arguments])
    return code, tensors_of(tmp_path / "second") if code == 0 else None


def same(found, expected, kind, of):
    names = [name.removeprefix(f"{of}/") for name in expected if name.startswith(f"{of}/")]
    return all(torch.allclose(found[f"{kind}/{n}"], expected[f"{of}/{n}"], rtol=0, atol=1e-7) for n in names)


def test_weights_alone(tmp_path, digits, first, capsys):
    code, found = started(tmp_path, digits, first, data__resolution=8)
    expected = tensors_of(first)
    assert code == 0
    assert same(found, expected, "master", "master")
    assert same(found, expected, "ema", "master")  # the average starts at the weights
    assert not same(found, expected, "ema", "ema")
    assert f"starting from the master weights of {first}, step 4" in capsys.readouterr().err
    assert metrics_of(tmp_path / "second")[0]["step"] == 1


def test_the_average_goes_on_if_asked(tmp_path, digits, first):
    _, found = started(tmp_path, digits, first, train__init_ema=True)
    expected, before = tensors_of(first), {}
    # One step of the average's own: decay (1 + 1)/(10 + 1) at its first step.
    for name, value in expected.items():
        if name.startswith("ema/"):
            weights = expected[name.replace("ema/", "master/")]
            before[name] = value + (weights - value) * (1 - 2 / 11)
    assert same(found, before, "ema", "ema")
    assert same(found, expected, "master", "master")


def test_the_average_as_weights(tmp_path, digits, first):
    _, found = started(tmp_path, digits, first, train__init_weights="ema")
    assert same(found, tensors_of(first), "master", "ema")


def test_under_another_layout(tmp_path, digits, first):
    """Each rank takes its part of a weight and of its average."""
    trees = [
        frozen(tiny_config(tmp_path / str(i), digits, train__init_from=str(first), train__init_ema=True, parallel=how))
        for i, how in enumerate([{"zero_stage": 3}, {"tensor": 2, "zero_stage": 1}])
    ]
    train_on(1, frozen(tiny_config(tmp_path / "one", digits, train__init_from=str(first), train__init_ema=True)))
    train_on(2, *trees)
    expected = tensors_of(tmp_path / "one")
    for i in range(2):
        found = tensors_of(tmp_path / str(i))
        assert same(found, expected, "master", "master")
        assert same(found, expected, "ema", "ema")


def test_a_resume_takes_the_runs_own(tmp_path, digits, first):
    tree = tiny_config(tmp_path / "second", digits, train__init_from=str(first), train__steps=2)
    path = config_file(tmp_path, tree)
    assert main(["train", path]) == 0
    whole = metrics_of(tmp_path / "second")
    assert main(["train", path, f"run.dir={tmp_path / 'third'}", "train.steps=1"]) == 0
    assert main(["train", path, f"run.dir={tmp_path / 'third'}"]) == 0
    assert [line["loss"] for line in metrics_of(tmp_path / "third")] == [line["loss"] for line in whole]


GROWN = {"text": {"encoder": "bytes", "width": 24, "max_tokens": 8}}


def test_another_caption_width(tmp_path, digits, first, capsys):
    model = tiny_config(tmp_path, digits)["model"] | {"cap_feat_dim": 24}
    assert started(tmp_path, digits, first, model=model, **GROWN)[0] == 2
    said = capsys.readouterr().err
    assert "train.init_from=" in said
    assert "cap_embedder.0.weight is (16,) instead of (24,)" in said
    assert "--allow-missing" in said
    allow = ["--allow-missing", "cap_embedder.*", "--allow-missing", "layers.*.attention_y_norm.weight"]
    allow += ["--allow-missing", "layers.*.attention.w?_y.weight"]
    code, found = started(tmp_path, digits, first, *allow, model=model, **GROWN)
    assert code == 0
    assert "drawn anew, as train.allow_missing lets it: " in capsys.readouterr().err
    expected = tensors_of(first)
    for name in ("x_embedder.weight", "layers.1.feed_forward.w2.weight"):
        assert torch.allclose(found[f"master/{name}"], expected[f"master/{name}"], rtol=0, atol=1e-7)
    assert found["master/cap_embedder.1.weight"].shape[1] == 24


def test_from_classes_to_captions(tmp_path, digits, capsys):
    """The text branch and its tokens are drawn, the table of classes is left out."""
    tree = frozen(tiny_config(tmp_path / "classes", digits))
    del tree["text"], tree["model"]
    tree["model"] = {k: v for k, v in tiny_config(tmp_path, digits)["model"].items() if k != "cap_feat_dim"}
    tree["model"]["num_classes"] = 10
    assert main(["train", config_file(tmp_path, tree)]) == 0
    new = ("cap_embedder.*", "*_y.weight", "*ky_norm*", "*attention.gate", "*_token", "*attention_y_norm*")
    allow = [word for pattern in (*new, "y_embedder.*") for word in ("--allow-missing", pattern)]
    code, found = started(tmp_path, digits, tmp_path / "classes", *allow)
    assert code == 0
    said = capsys.readouterr().err
    assert "left out, as train.allow_missing lets it: y_embedder.embedding_table.weight" in said
    assert torch.count_nonzero(found["master/layers.0.attention.gate"]) == 0  # as it is drawn
    assert same(
        found, {k: v for k, v in tensors_of(tmp_path / "classes").items() if "y_emb" not in k}, "master", "master"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__allow_missing": ["wq"]}, "train.allow_missing: nothing that is missing or left over is called wq"),
        ({"train__init_from": "nowhere"}, "nowhere: no such folder"),
        ({"model__n_heads": 4}, "model.n_heads is 4, and 2 in train.init_from="),
    ],
)
def test_what_is_refused(tmp_path, digits, first, capsys, changes, message):
    tree = tiny_config(tmp_path / "second", digits, **({"train__init_from": str(first)} | changes))
    tree["model"] = dict(tree["model"])
    assert main(["train", config_file(tmp_path, tree)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_options_of_init_from_alone_are_refused(tmp_path, digits, capsys):
    path = config_file(tmp_path, tiny_config(tmp_path / "second", digits))
    assert main(["train", path, "train.init_ema=true"]) == 2
    assert "say how to start from train.init_from; set it" in capsys.readouterr().err
