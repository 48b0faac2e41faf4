"""The ready configurations: sizes of the public models, under layouts that can run where they are meant to."""

from pathlib import Path

import pytest
import torch

from lumina.checkpoint.load import model_config
from lumina.config.load import load_config
from lumina.model.flag_dit import FlagDiT
from lumina.parallel.layout import check_layout

CONFIGS = Path(__file__).parents[2] / "configs"

# Parameters of the public set (the 7B at 131,072 tokens has a nextframe token more), and numbers of GPUs.
READY = {
    "600m": (814_459_936, [1, 8, 16]),
    "3b": (4_237_824_032, [8, 16]),
    "5b": (5_046_643_744, [8, 32]),
    "5b-stages": (5_046_643_744, [8, 16, 64]),
    "5b-lora": (5_046_643_744, [1, 2, 8]),
    "7b": (8_371_142_688, [16, 32, 128]),
    "7b-128k": (8_371_142_688 + 4096, [16, 32, 128]),
}


# What tests/unit/test_ready_small_configs.py trains.
SMALL = ("digits", "digit-sheets", "moving-digits", "turntable", "speech", "four")


@pytest.mark.parametrize("name", READY)
def test_sizes_and_layouts(name):
    parameters, worlds = READY[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    sizes = model_config(config)
    with torch.device("meta"):
        model = FlagDiT(sizes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    for world in worlds:
        check_layout(config, sizes, world)


def test_every_configuration_is_looked_at():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*READY, *SMALL}


@pytest.mark.parametrize(
    ("name", "override", "world"),
    [
        ("7b", ["parallel.tensor=1", "parallel.sequence=false"], 16),
        ("7b-128k", ["parallel.ring=1"], 8),
        ("7b-128k", ["parallel.ring=4", "parallel.offload_activations=true"], 32),
    ],
)
def test_what_their_comments_advise(name, override, world):
    config = load_config(CONFIGS / f"{name}.yaml", override)
    check_layout(config, model_config(config), world)
