"""The schema and its errors, DeepSpeed's dict, and that names are the same wherever they are listed."""

from typing import get_args

import pytest

from lumina.config.deepspeed import deepspeed_config
from lumina.config.load import dump_config, load_config, parse_yaml, validate
from lumina.config.schema import FlowConfig
from lumina.flow.loss import WEIGHTINGS
from lumina.flow.path import PATHS, PREDICTIONS
from lumina.flow.time import TIME_LAWS
from lumina.train.schedule import learning_rate
from tests.parallel.runs import tiny_config


def tree(tmp_path, **changes):
    return tiny_config(tmp_path / "run", tmp_path, **changes)


def test_yaml_round_trip(tmp_path):
    config = validate(tree(tmp_path), "test")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_overrides_are_yaml_values(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(validate(tree(tmp_path), "test")))
    config = load_config(
        path, ["train.learning_rate=3e-4", "train.betas=[0.9, 0.95]", "text=null", "model.num_classes=10"]
    )
    assert config.train.learning_rate == 3e-4
    assert config.train.betas == (0.9, 0.95)
    assert config.text is None
    assert config.model["num_classes"] == 10


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2e3), ("1.5e-3", 1.5e-3), ("7", 7), (".5", 0.5), ("e5", "e5")]
)
def test_numbers_are_read_as_people_write_them(text, value):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train__stepz": 3}, r"unknown key train.stepz; did you mean train.steps\?"),
        ({"trian": {}}, r"unknown key trian; did you mean train\?"),
        ({"checkpoint__asink": True}, r"unknown key checkpoint.asink; did you mean checkpoint.async\?"),
        ({"train__steps": "ten"}, "train.steps: input should be a valid integer, not 'ten'"),
        ({"train__steps": 2.5}, "train.steps: .*integer"),
        ({"train__steps": 0}, "train.steps: .*greater than or equal to 1, not 0"),
        ({"precision": "fp8"}, "precision: .*'fp32' or 'bf16'"),
        ({"parallel__zero_stage": 4}, "parallel.zero_stage: .*3"),
        ({"preview__every": 5}, "preview.prompts is empty"),
        ({"train__betas": [0.9, 1.0]}, r"train.betas: both must lie in \[0, 1\)"),
        ({"data": {}}, "data: name what to train on by data.shards, or several sets by data.sets"),
        ({"data": {"shards": ["a"], "sets": [{"shards": ["b"]}]}}, "data.shards, or several sets by data.sets"),
        ({"data__stages": [{"from_step": 0, "resolution": 64}], "data__resolution": 64}, "leave data.resolution out"),
    ],
)
def test_errors_are_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        validate(tree(tmp_path, **changes), "file.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("file.yaml: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("run: {dir: x", "line 1: not valid YAML"), ("[1]", "a mapping of sections"), ("", "a mapping of sections")],
)
def test_broken_files(tmp_path, text, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_config(path)
    with pytest.raises(ValueError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


def test_bad_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(validate(tree(tmp_path), "test")))
    with pytest.raises(ValueError, match=r"section.key=value"):
        load_config(path, ["train.steps"])
    with pytest.raises(ValueError, match="precision is a value"):
        load_config(path, ["precision.x=3"])


def test_the_schema_offers_what_the_flow_has():
    fields = FlowConfig.model_fields
    assert set(get_args(fields["path"].annotation)) == set(PATHS)
    assert set(get_args(fields["prediction"].annotation)) == set(PREDICTIONS)
    assert set(get_args(fields["weighting"].annotation)) == set(WEIGHTINGS)
    assert set(get_args(fields["time_law"].annotation)) == set(TIME_LAWS)


def test_deepspeed_is_told_what_the_configuration_says(tmp_path):
    config = validate(tree(tmp_path, precision="bf16", parallel__zero_stage=2, train__clip_norm=0.5), "test")
    told = deepspeed_config(config, accumulation_steps=3, elements=1000)
    assert told["zero_optimization"]["stage"] == 2
    assert told["bf16"]["enabled"]
    assert told["gradient_clipping"] == 0.5
    assert told["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.1),
        ("constant", 5, 0.5),
        ("constant", 10, 1.0),
        ("constant", 100, 1.0),
        ("linear", 55, 0.55),
        ("linear", 100, 0.1),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("cosine", 32, 0.1 + 0.9 * 0.5 * (1 + 0.7193398)),
    ],
)
def test_learning_rate(tmp_path, schedule, step, expected):
    config = validate(
        tree(
            tmp_path,
            train__steps=100,
            train__schedule=schedule,
            train__learning_rate=1.0,
            train__warmup_steps=10,
            train__final_learning_rate=0.1,
        ),
        "test",
    )
    assert learning_rate(config.train, step) == pytest.approx(expected, rel=1e-6)
