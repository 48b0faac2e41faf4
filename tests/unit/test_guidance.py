"""Guidance by channels and by time: against a piecewise loop, and by counting what the model is called with."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lumina import LuminaPipeline
from lumina.inference.guidance import Guidance
from lumina.model.flag_dit import FlagDiT
from tests.unit.test_extrapolate import TINY, seeded, write_folder

SIZE = {"height": 4, "width": 6, "num_inference_steps": 10}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    config = replace(TINY, in_channels=3)
    return LuminaPipeline.from_pretrained(write_folder(tmp_path_factory.mktemp("model"), config), device="cpu")


def by_hand(pipeline, scale_at, channels=3, steps=10):
    """Euler, with a guidance of scale_at(step) in the first channels and none in the others."""
    features, mask = pipeline.text_encoder(["a two", "a blot"])
    x = torch.randn((1, 1, 3, 4, 6), generator=seeded())
    for step, (t, after) in enumerate(pairwise(i / steps for i in range(steps + 1))):
        with torch.no_grad():
            wanted, unwanted = (
                pipeline.model(x, torch.tensor([t]), features[i : i + 1], mask[i : i + 1]) for i in (0, 1)
            )
        velocity = wanted.clone()
        guided = unwanted + scale_at(step) * (wanted - unwanted)
        velocity[:, :, :channels] = guided[:, :, :channels]
        x = x + (after - t) * velocity
    return x


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.0, 1.0), range(10)), ((0.3, 0.7), range(3, 8)), ((0.0, 0.25), range(3)), ((0.55, 1.0), range(6, 10))],
)
def test_an_interval_is_guided_and_the_rest_is_not(pipeline, monkeypatch, interval, guided):
    """Both ends are inside, whatever 0.3 and 0.7 are in binary; outside, a step is one call of half the samples."""
    sizes, forward = [], FlagDiT.forward

    def counted(self, x, *args, **kwargs):
        sizes.append(len(x))
        return forward(self, x, *args, **kwargs)

    expected = by_hand(pipeline, lambda step: 3.5 if step in guided else 1.0)
    monkeypatch.setattr(FlagDiT, "forward", counted)
    settings = {"guidance_scale": 3.5, "negative_prompt": "a blot", "guidance_interval": interval, **SIZE}
    found = pipeline("a two", generator=seeded(), **settings).latents
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert sizes == [2 if step in guided else 1 for step in range(10)]


def test_a_batch_keeps_its_own_prompts_outside_the_interval(pipeline):
    settings = {"guidance_interval": (0.2, 0.5), **SIZE}
    prompts = ["a two", "a very long handwritten three"]
    together = pipeline(prompts, generator=[seeded(0), seeded(1)], **settings).latents
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=[seeded(i)], **settings).latents[0]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_first_channels_are_guided(pipeline, channels):
    settings = {"guidance_scale": 3.5, "negative_prompt": "a blot", "guided_channels": channels, **SIZE}
    found = pipeline("a two", generator=seeded(), **settings).latents
    torch.testing.assert_close(found, by_hand(pipeline, lambda _: 3.5, channels), atol=1e-4, rtol=1e-4)
    everywhere = pipeline("a two", generator=seeded(), **settings | {"guided_channels": None}).latents
    assert torch.allclose(found, everywhere, atol=1e-5) == (channels == 3)


def test_labels_are_guided_by_interval(tmp_path):
    labels = replace(TINY, cap_feat_dim=None, num_classes=5, frames=False)
    pipeline = LuminaPipeline.from_pretrained(write_folder(tmp_path, labels), device="cpu")
    x = torch.randn(1, 1, 1, 4, 6, generator=seeded())
    for step in range(4):
        with torch.no_grad():
            wanted, none = (
                pipeline.model(x, torch.tensor([step / 4]), labels=torch.tensor([label])) for label in (3, 5)
            )
        x = x + (none + 2.0 * (wanted - none) if step in (1, 2) else wanted) / 4
    settings = {"guidance_scale": 2.0, "guidance_interval": (0.25, 0.5), **SIZE | {"num_inference_steps": 4}}
    found = pipeline(3, generator=seeded(), **settings).latents
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_when_it_applies():
    guidance = Guidance(2.0, interval=(0.3, 0.7))
    seen = [torch.tensor(t).item() for t in (0.3, 0.7)]  # as the network has them: float32
    assert all(map(guidance.applies, [0.3, 0.1 + 0.2, 0.5, 0.7, *seen]))
    assert not any(map(guidance.applies, [0.0, 0.29999, 0.70001, 1.0]))
    assert not Guidance(1.0).applies(0.5)
    assert Guidance(0.0).applies(0.0)
    assert Guidance(0.0).applies(1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guided_channels": 0}, "guided_channels is 0; .* at least 1"),
        ({"guided_channels": 4}, "guided_channels is 4; the latents have 3 channels"),
        ({"guided_channels": 2, "guidance_scale": 1.0}, "is 1, which is no guidance; leave guided_channels out"),
        ({"guidance_interval": (0.2, 0.4), "guidance_scale": 1.0}, "no guidance; leave guidance_interval out"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval is 0.5 to 0.5; it is two times, 0 ≤ start < stop ≤ 1"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval is -0.1 to 0.5"),
        ({"guidance_interval": (0.1, 1.5)}, "guidance_interval is 0.1 to 1.5"),
        ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval is nan to 1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a finite number"),
    ],
)
def test_refusals(pipeline, settings, words):
    with pytest.raises(ValueError, match=words):
        pipeline("a two", **(SIZE | settings))
