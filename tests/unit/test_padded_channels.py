"""Samples of fewer channels than the model: trained on and drawn as a model of their own channels would."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lumina import LuminaPipeline
from lumina.cli import main
from lumina.config.schema import VaeConfig
from lumina.encoders.text import build_text_encoder
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective, per_sample_mean
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import unpack
from lumina.parallel.randomness import Randomness
from lumina.train.prepare import Preparer
from tests.unit.test_pipeline import TEXT, seeded, write_folder
from tests.unit.test_train_parts import MESH, Sample

WIDE = FlagDiTConfig(dim=16, n_layers=2, n_heads=2, multiple_of=16, in_channels=3, cap_feat_dim=16, frames=True)
NARROW = replace(WIDE, in_channels=1)


def preparer(model, pad=True):
    vae, text = build_vae(VaeConfig(), model.in_channels), build_text_encoder(TEXT)
    return Preparer(model, vae, text, Objective.build(), Randomness(3), 0.0, MESH, pad)


def latent(sample_id, *shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sample_id))
    moments = torch.cat((values, torch.zeros_like(values)), dim=1)
    return Sample(sample_id=sample_id, pixels=None, caption=f"number {sample_id}", latent=moments)


WORD, PICTURE, VIDEO = latent(1, 1, 1, 8, 4), latent(2, 1, 3, 4, 4), latent(3, 2, 2, 4, 2)


def weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def narrowed(name, value):
    """Of a parameter of the wide model, or of its gradient: what a model of the first channel alone has."""
    if name == "x_embedder.weight":  # (dim, C·p·p)
        return value.unflatten(1, (3, 2, 2))[:, :1].flatten(1)
    if name.startswith("final_layer.linear"):  # (p·p·2C, …), the second half of the channels unused
        return value.unflatten(0, (2, 2, 2, 3))[:, :, :, :1].flatten(0, 3)
    return value


def losses_of(model, pack):
    """In float64, which the objective itself would leave."""
    data, noise, t = pack.data.double(), pack.noise.double(), pack.t_of_token.double()[:, None]
    captions = replace(pack.captions, features=pack.captions.features.double())
    output = model(t * data + (1 - t) * noise, pack.t.double(), layout=pack.layout, captions=captions)
    return pack.per_sample((output - (data - noise)) ** 2)


def test_loss_and_gradients_are_those_of_a_model_of_its_own_channels():
    wide, narrow = weights(FlagDiT(WIDE)), FlagDiT(NARROW).double()
    narrow.load_state_dict({name: narrowed(name, value) for name, value in wide.state_dict().items()})
    loss, expected = losses_of(wide, preparer(WIDE)([WORD])), losses_of(narrow, preparer(NARROW)([WORD]))
    assert 0.5 < expected.item() < 100
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    of_narrow = {name: parameter.grad for name, parameter in narrow.named_parameters()}
    for name, parameter in wide.named_parameters():
        if parameter.grad is None:
            assert of_narrow[name] is None
            continue
        found = narrowed(name, parameter.grad)
        torch.testing.assert_close(found, of_narrow[name], rtol=1e-9, atol=1e-12)
        if found.shape != parameter.shape:  # and of the padding none at all
            assert parameter.grad.count_nonzero() == found.count_nonzero() > 0


def test_a_padded_sample_is_prepared_alike_in_any_pack():
    prepare, model = preparer(WIDE), weights(FlagDiT(WIDE))
    samples = [WORD, PICTURE, VIDEO]
    pack = prepare(samples)
    assert pack.channels == (1, 3, 2)
    data, noise = unpack(pack.data, pack.layout), unpack(pack.noise, pack.layout)
    for sample, count, ours, drawn in zip(samples, pack.channels, data, noise, strict=True):
        values = sample.latent.chunk(2, dim=1)[0]
        assert torch.equal(ours[:, :count], values)
        assert torch.equal(drawn[:, :count], Randomness(3).normal("noise", sample, tuple(values.shape)))
        assert ours[:, count:].count_nonzero() == drawn[:, count:].count_nonzero() == 0
    together = losses_of(model, pack)
    assert prepare([PICTURE]).channels is None
    alone = torch.cat([losses_of(model, prepare([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)


def test_the_mean_is_over_a_samples_own_values():
    """Against the numbers written out; tokens 1 and 4 are learned ones, and what is padded is not finite."""
    error = torch.tensor([[1, 3, 9], [7, 7, 7], [2, 6, 1], [4, torch.nan, torch.nan], [torch.nan] * 3])
    valid = torch.tensor([True, False, True, True, False])
    mean = per_sample_mean(error, valid, torch.tensor([3, 2]), width_n=torch.tensor([2, 1]))
    assert mean.tolist() == [3.0, 4.0]
    halves = [
        per_sample_mean(part, ok, lengths, torch.tensor([2, 1]), torch.tensor([2, 1]))
        for part, ok, lengths in (
            (error[:2], valid[:2], torch.tensor([2, 0])),
            (error[2:], valid[2:], torch.tensor([1, 2])),
        )
    ]
    assert sum(halves).tolist() == [3.0, 4.0]


def test_what_is_not_padded():
    with pytest.raises(ValueError, match=r"^sample key1 holds latents of 1 channels; model.in_channels=3; data.pad_ch"):
        preparer(WIDE, pad=False)([WORD])
    for pad in (False, True):
        with pytest.raises(ValueError, match=r"^sample key2 holds latents of 3 channels; model.in_channels=1$"):
            preparer(NARROW, pad)([PICTURE])


# Drawing.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def pipeline(folder):
    return LuminaPipeline.from_pretrained(folder, device="cpu")


SIZE = {"height": 8, "width": 4, "num_inference_steps": 4}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawn_with_zeros_in_the_padding(pipeline, guidance):
    """Against Euler steps written out, which put the zeros back after each."""
    output = pipeline("a two", guidance_scale=guidance, generator=seeded(), channels=1, **SIZE)
    assert output.latents.shape == (1, 1, 1, 8, 4)
    x = torch.zeros(1, 1, 3, 8, 4)
    x[:, :, :1] = torch.randn(1, 1, 1, 8, 4, generator=seeded())
    features, mask = build_text_encoder(TEXT)(["a two", ""])
    for step in range(4):
        with torch.no_grad():
            both = pipeline.model(torch.cat((x, x)), torch.full((2,), step / 4), features, mask)
        v = both[1:] + guidance * (both[:1] - both[1:])
        x = x + v / 4
        x[:, :, 1:] = 0
    torch.testing.assert_close(output.latents, x[:, :, :1], rtol=1e-4, atol=1e-4)
    (image,) = output.images
    assert (image.mode, image.size) == ("L", (4, 8))
    whole = pipeline("a two", guidance_scale=guidance, generator=seeded(), **SIZE)
    assert whole.latents.shape[2] == 3
    assert whole.images[0].mode == "RGB"


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("heun", {"num_inference_steps": 3}),
        ("dopri5", {"rtol": 1e-3, "atol": 1e-3}),
        ("sde_euler", {"num_inference_steps": 3, "last_step": "mean"}),
    ],
)
def test_every_solver_draws_as_a_model_of_those_channels_does(pipeline, solver, options):
    """Also where noise is added on the way, and where steps are chosen by the size of the error."""
    narrow = FlagDiT(NARROW)
    narrow.load_state_dict({name: narrowed(name, value) for name, value in pipeline.model.state_dict().items()})
    other = LuminaPipeline(narrow, build_vae(VaeConfig(), 1), build_text_encoder(TEXT), Objective.build())
    settings = {"solver": solver, "height": 8, "width": 4, "num_frames": 2, "guidance_scale": 2.0, **options}
    found = pipeline("a two", generator=[seeded()], channels=1, **settings).latents
    expected = other("a two", generator=[seeded()], **settings).latents
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [0, 2, 4, -1])
def test_channels_that_there_are_not(pipeline, channels):
    with pytest.raises(
        ValueError, match=rf"^channels is {channels}; pictures have 1 or 3, and this model draws at most 3$"
    ):
        pipeline("a two", channels=channels, **SIZE)


def test_an_autoencoder_decodes_its_own_channels_alone(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "decodes", lambda channels: channels == 3)
    with pytest.raises(ValueError, match=r"^channels is 1, but the autoencoder decodes latents of 3 only"):
        pipeline("a two", channels=1, **SIZE)


def test_from_the_command_line(folder, pipeline, tmp_path):
    out = tmp_path / "out"
    sizes = ["--height", "8", "--width", "4", "--steps", "4", "--guidance", "2", "--seed", "7"]
    assert main(["sample", str(folder), "--prompt", "a two", "--channels", "1", "--out", str(out), *sizes]) == 0
    (record,) = json.loads((out / "samples.json").read_text())
    assert record["settings"]["channels"] == 1
    expected = pipeline("a two", guidance_scale=2.0, generator=[seeded(7)], channels=1, **SIZE).images[0]
    with Image.open(out / record["file"]) as image:
        assert (image.mode, image.tobytes()) == ("L", expected.tobytes())
