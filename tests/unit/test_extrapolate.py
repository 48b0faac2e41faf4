"""Sampling at lengths not trained on: factors worked out by hand, and what the model is called with."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lumina import LuminaPipeline
from lumina.checkpoint.sources import open_source, public_trained
from lumina.config.schema import DataConfig, TextConfig, TrainedConfig, VaeConfig
from lumina.data.buckets import buckets
from lumina.flow.loss import Objective
from lumina.flow.solver import sample
from lumina.inference.extrapolate import ExtrapolationSettings, defaults_for, longest_trained, settings_for
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import save_pretrained
from lumina.model.rope import TRAINED, Extrapolation

TEXT = TextConfig(encoder="bytes", width=16, max_tokens=8)
TINY = FlagDiTConfig(dim=16, n_layers=2, n_heads=2, multiple_of=16, in_channels=1, cap_feat_dim=16, frames=True)
# Patches of 2 × 2 pixels, at most four of them a picture: the longest has four rows of a patch and a nextline.
TRAINED_AT = {"trained": {"resolution": 4, "frames": 1}}
SIZE = {"height": 8, "width": 8, "num_inference_steps": 3}  # 4 rows of 5 tokens
RATIO = 20 / 8


def write_folder(folder, config=TINY, **sections):
    torch.manual_seed(0)
    model = FlagDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = {"text": TEXT.model_dump()} if config.text_conditional else {}
    save_pretrained(model, folder, extra=text | {"vae": VaeConfig().model_dump()} | sections)
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A pipeline that knows its trained length, of 8 tokens."""
    return LuminaPipeline.from_pretrained(write_folder(tmp_path_factory.mktemp("known"), **TRAINED_AT), device="cpu")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    return LuminaPipeline.from_pretrained(write_folder(tmp_path_factory.mktemp("unknown")), device="cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(pipeline, extrapolation_at, *, shift=1.0, shape=(1, 1, 1, 8, 8), steps=3, scale=4.0):
    """Guided Euler, the model called directly with `extrapolation_at(t)`."""
    features, mask = pipeline.text_encoder(["a two", ""])
    x = torch.randn(shape, generator=seeded())
    grid = [s / (s + shift * (1 - s)) for s in (i / steps for i in range(steps + 1))]
    for t, after in pairwise(grid):
        with torch.no_grad():
            wanted, unwanted = (
                pipeline.model(x, torch.tensor([t]), features[i : i + 1], mask[i : i + 1], None, extrapolation_at(t))
                for i in (0, 1)
            )
        x = x + (after - t) * (unwanted + scale * (wanted - unwanted))
    return x


def calls_of(pipeline, monkeypatch, **settings):
    """(t, extrapolation, samples) of every call of the model."""
    calls, forward = [], FlagDiT.forward

    def recorded(self, x, t, cap_feats=None, cap_mask=None, labels=None, extrapolation=TRAINED, **rest):
        calls.append((t[0].item(), extrapolation, len(x)))
        return forward(self, x, t, cap_feats, cap_mask, labels, extrapolation, **rest)

    monkeypatch.setattr(FlagDiT, "forward", recorded)
    pipeline("a two", generator=seeded(), **(SIZE | settings))
    return calls


@pytest.mark.parametrize(
    ("rope", "extrapolation"),
    [
        ("none", Extrapolation()),
        ("interpolate", Extrapolation(rope_scaling_factor=RATIO)),
        ("ntk", Extrapolation(ntk_factor=RATIO)),
    ],
)
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_scheme_is_the_model_with_its_factor(known, rope, extrapolation, proportional, scale):
    if proportional:
        extrapolation = replace(extrapolation, base_seqlen=8)
    settings = {"rope": rope, "proportional_attention": proportional, "time_shift": 1.0, "guidance_scale": scale}
    found = known("a two", generator=seeded(), **settings, **SIZE).latents
    torch.testing.assert_close(found, by_hand(known, lambda t: extrapolation, scale=scale), atol=1e-5, rtol=1e-5)


def test_the_schemes_differ(known):
    settings = {"time_shift": 1.0, "proportional_attention": False, **SIZE}
    none, interpolate, ntk, aware = (
        known("a two", generator=seeded(), rope=rope, **settings).latents
        for rope in ("none", "interpolate", "ntk", "time-aware")
    )
    sharpened = known("a two", generator=seeded(), rope="none", **settings | {"proportional_attention": True}).latents
    found = [none, interpolate, ntk, aware, sharpened]
    assert all((a - b).abs().max() > 2e-4 for i, a in enumerate(found) for b in found[:i])


def test_time_aware_is_both_in_turn(known):
    found = known("a two", generator=seeded(), rope="time-aware", rope_switch=0.5, time_shift=1.0, **SIZE).latents

    def at(t):
        return Extrapolation(RATIO, 1.0, 8) if t < 0.5 else Extrapolation(1.0, RATIO, 8)

    torch.testing.assert_close(found, by_hand(known, at), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("switch", "interpolated"), [(0.0, 0), (0.3, 3), (0.35, 4), (0.7, 7), (1.0, 10)])
def test_time_aware_switches_at_its_time(known, monkeypatch, switch, interpolated):
    """Of ten steps at 0, 0.1, … the one at the switch itself is the first of ntk, whatever 0.3 is in binary."""
    settings = {"rope": "time-aware", "rope_switch": switch, "num_inference_steps": 10, "time_shift": 1.0}
    calls = calls_of(known, monkeypatch, **settings)
    early, late = Extrapolation(RATIO, 1.0, 8), Extrapolation(1.0, RATIO, 8)
    assert [extrapolation for _, extrapolation, _ in calls] == [early] * interpolated + [late] * (10 - interpolated)


def test_time_aware_goes_by_the_time_that_the_model_sees(known, monkeypatch):
    """Of the shifted grid, and within a step: midpoint's second call lies beyond a switch that its first is before."""
    calls = calls_of(known, monkeypatch, rope="time-aware", rope_switch=0.2, solver="midpoint", num_inference_steps=2)
    shift = math.sqrt(RATIO)
    half = 0.5 / (0.5 + shift * 0.5)
    assert [t for t, _, _ in calls] == pytest.approx([0, half / 2, half, (1 + half) / 2])
    assert half / 2 < 0.2 < half
    assert [extrapolation.rope_scaling_factor for _, extrapolation, _ in calls] == [RATIO, RATIO, 1, 1]
    calls = calls_of(known, monkeypatch, rope="time-aware", rope_switch=0.1, solver="midpoint", num_inference_steps=2)
    assert [extrapolation.ntk_factor for _, extrapolation, _ in calls] == [1, RATIO, RATIO, RATIO]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_none_is_what_it_was_before(unknown, known, guidance):
    """Bit for bit: no trained length known, all switched off, and a size within the trained one."""
    features, mask = unknown.text_encoder(["a two"] + [""] * (guidance != 1))
    conditions = {"cap_feats": features, "cap_mask": mask}

    def plain(x, t):
        if guidance == 1:
            return unknown.model(x, t, **conditions)
        return unknown.model.forward_with_cfg(torch.cat((x, x)), torch.cat((t, t)), cfg_scale=guidance, **conditions)[
            :1
        ]

    off = {"rope": "none", "proportional_attention": False, "time_shift": 1.0}
    for side, pipeline, settings in ((8, unknown, {}), (8, unknown, off), (8, known, off), (4, known, {})):
        noise = torch.randn((1, 1, 1, side, side), generator=seeded())
        expected = sample(plain, noise, Objective.build(), steps=3)
        size = {"height": side, "width": side, "num_inference_steps": 3}
        found = pipeline("a two", generator=seeded(), guidance_scale=guidance, **size, **settings).latents
        assert torch.equal(found, expected)


def test_the_defaults_are_those_of_the_ratio(known):
    found = known.extrapolation_for(8, 8)
    assert found == ExtrapolationSettings("time-aware", RATIO, 0.3, True, 8, math.sqrt(RATIO))
    asked = {"rope": "time-aware", "rope_switch": 0.3, "rope_factor": RATIO, "proportional_attention": True}
    drawn = known("a two", generator=seeded(), **SIZE).latents
    again = known("a two", generator=seeded(), time_shift=math.sqrt(RATIO), **asked, **SIZE).latents
    assert torch.equal(drawn, again)
    for within in ((4, 4), (2, 2), (8, 2)):
        assert known.extrapolation_for(*within) == ExtrapolationSettings(trained_length=8)
    assert defaults_for(1.0) == ExtrapolationSettings()
    assert defaults_for(4.0) == ExtrapolationSettings("time-aware", 4.0, 0.3, False, None, 2.0)


def test_each_default_is_overridden_alone():
    whole = settings_for(40, 10)
    for name, value in (
        ("rope_factor", 7.0),
        ("rope_switch", 0.9),
        ("proportional_attention", False),
        ("time_shift", 6.0),
    ):
        assert settings_for(40, 10, **{name: value}) == replace(whole, **{name: value})
    assert settings_for(40, 10, rope="ntk") == replace(whole, rope="ntk", rope_switch=None)
    assert settings_for(40, 10, rope="none") == replace(whole, rope="none", rope_switch=None, rope_factor=1.0)
    assert settings_for(5, 10, rope="ntk").rope_factor == 1.0
    assert settings_for(40, None, rope="ntk", rope_factor=2.0) == ExtrapolationSettings("ntk", 2.0)


def test_frames_and_their_tokens_count(known, unknown):
    """Three frames of 2 × 3 patches: 3 · 2 · (3 + 1) tokens and two nextframes between them."""
    assert known.extrapolation_for(4, 6, 3).rope_factor == pytest.approx(26 / 8)
    settings = {"rope": "interpolate", "time_shift": 1.0, "trained_length": 13}
    found = unknown("a two", 4, 6, 3, 3, generator=seeded(), **settings, proportional_attention=True).latents
    expected = by_hand(unknown, lambda t: Extrapolation(2.0, 1.0, 13), shape=(1, 3, 1, 4, 6))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_labels_have_no_tokens_but_patches(tmp_path):
    labels = replace(TINY, cap_feat_dim=None, num_classes=5, frames=False)
    pipeline = LuminaPipeline.from_pretrained(write_folder(tmp_path, labels, **TRAINED_AT), device="cpu")
    assert pipeline.trained_length == 4
    assert pipeline.extrapolation_for(8, 8).rope_factor == 4.0


@pytest.mark.parametrize("resolution", [4, 6, 16, 32])
@pytest.mark.parametrize(("frames", "nextline"), [(1, True), (3, True), (3, False)])
def test_the_longest_that_was_trained_on(resolution, frames, nextline):
    """Among all shapes that training brings pictures to."""
    lengths = [frames * h * (w + nextline) + (frames - 1) * nextline for h, w in buckets(resolution // 2)]
    assert longest_trained(TrainedConfig(resolution=resolution, frames=frames), 2, nextline) == max(lengths)


def test_the_longest_that_was_trained_on_may_not_be_known():
    assert longest_trained(None, 2, True) is None
    assert longest_trained(TrainedConfig(resolution=1), 2, True) is None
    assert longest_trained(TrainedConfig(resolution=2), 2, False) is None  # one patch attends to itself alone


@pytest.mark.parametrize(
    ("data", "step", "trained"),
    [
        ({"resolution": 64, "frames": 5}, 100, TrainedConfig(resolution=64, frames=5)),
        ({}, 100, None),
        ({"stages": [(0, 32), (50, 64)]}, 49, TrainedConfig(resolution=32)),
        ({"stages": [(0, 32), (50, 64)]}, 50, TrainedConfig(resolution=64)),
        ({"stages": [(0, 32), (50, None)]}, 50, None),
    ],
)
def test_a_run_says_what_it_was_trained_at(data, step, trained):
    if "stages" in data:
        stages = [{"from_step": at, "resolution": resolution} for at, resolution in data["stages"]]
        data = {"stages": stages}
    assert DataConfig.model_validate({"shards": ["x"], **data}).trained_by(step) == trained


def test_the_folder_keeps_it(known, unknown, tmp_path):
    for name, pipeline in (("known", known), ("unknown", unknown)):
        pipeline.save_pretrained(tmp_path / name)
        again = LuminaPipeline.from_pretrained(tmp_path / name, device="cpu")
        assert again.trained_length == pipeline.trained_length
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written.get("trained") == (TRAINED_AT["trained"] if name == "known" else None)
        source = open_source(tmp_path / name)
        assert source.settings.get("trained") == written.get("trained")
    assert (known.trained_length, unknown.trained_length) == (8, None)
    assert public_trained({"image_size": 1024}) == TrainedConfig(resolution=1024)
    assert public_trained({}) is public_trained({"image_size": None}) is None
    with pytest.raises(ValueError, match=r"bad/config.json: "):
        LuminaPipeline.from_pretrained(write_folder(tmp_path / "bad", trained={"resolution": "big"}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope": "yarn"}, "rope is 'yarn'; it is none, interpolate, ntk or time-aware"),
        ({"rope": "ntk"}, "rope ntk needs the length that the model was trained at.* give trained_length"),
        ({"proportional_attention": True}, "proportional attention needs the length.* give trained_length"),
        ({"rope_factor": 2.0}, "rope_factor is 2, but rope is none"),
        ({"rope": "ntk", "rope_factor": 0.5}, "rope_factor is 0.5; .* at least 1"),
        ({"rope": "ntk", "rope_factor": math.inf}, "rope_factor is inf"),
        ({"rope_switch": 0.5}, "rope_switch is 0.5 and rope none; time-aware has a switch"),
        ({"rope": "ntk", "rope_factor": 2.0, "rope_switch": 0.5}, "rope_switch is 0.5 and rope ntk"),
        ({"rope": "time-aware", "rope_factor": 2.0, "rope_switch": 1.5}, "rope_switch is 1.5; it is a time from 0"),
        ({"trained_length": 1}, "trained_length is 1; .* at least 2"),
        ({"trained_length": 0}, "trained_length is 0; .* at least 2"),
        ({"time_shift": 0.0}, "time_shift must be a positive number, not 0.0"),
        ({"height": 7}, "height 7 and width 8 must be multiples of 2"),
    ],
)
def test_refusals(unknown, settings, words):
    with pytest.raises(ValueError, match=words):
        unknown("a two", **(SIZE | settings))
