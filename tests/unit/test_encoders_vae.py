"""Autoencoders: identity, and a small AutoencoderKL of random weights against direct diffusers calls."""

import json
import shutil

import pytest
import torch

from lumina.config.schema import VaeConfig
from lumina.encoders.vae import build_vae


def build(model="identity", in_channels=4, **settings):
    return build_vae(VaeConfig(model=str(model), **settings), in_channels)


def small_vae(**settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": 16,
        }
        | settings
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, the model in memory)."""
    folder = tmp_path_factory.mktemp("plain") / "somebodys"
    model = small_vae(scaling_factor=0.5, shift_factor=0.25)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def copy(saved, to, **changes):
    """A copy of the saved model with other config entries; None removes one."""
    shutil.copytree(saved[0], to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


def test_identity_is_the_pixels():
    vae = build(in_channels=1)
    pixels = torch.rand(2, 1, 80, 7) * 2 - 1
    assert (vae.factor, vae.latent_channels, vae.pixel_channels) == (1, 1, 1)
    assert vae.latent_shape(80, 7) == (1, 80, 7)
    assert torch.equal(vae.encode(pixels, None), pixels)
    assert torch.equal(vae.encode(pixels, torch.randn_like(pixels)), pixels)
    assert torch.equal(vae.decode(pixels), pixels)
    assert torch.equal(vae.decode(pixels * 3), (pixels * 3).clamp(-1, 1))
    assert "identity" in vae.describe()


def test_identity_honours_scale_shift_and_precision():
    pixels = torch.rand(1, 3, 4, 4) * 2 - 1
    vae = build(in_channels=3, scale=2.0, shift=0.5)
    torch.testing.assert_close(vae.encode(pixels, None), (pixels - 0.5) * 2)
    torch.testing.assert_close(vae.decode(vae.encode(pixels, None)), pixels)
    coarse = build(in_channels=3, dtype="bf16").encode(pixels, None)
    assert torch.equal(coarse, pixels.to(torch.bfloat16).float())


@torch.no_grad()
def test_encode_is_the_scaled_posterior(saved, images):
    folder, model = saved
    vae = build(folder)
    assert (vae.factor, vae.latent_channels, vae.pixel_channels) == (4, 4, 3)
    assert vae.latent_shape(32, 24) == (4, 8, 6)
    posterior = model.encode(images).latent_dist
    noise = torch.randn(2, 4, 8, 6)
    torch.testing.assert_close(vae.encode(images, None), (posterior.mean - 0.25) * 0.5)
    draw = posterior.mean + torch.exp(posterior.logvar / 2) * noise
    torch.testing.assert_close(vae.encode(images, noise), (draw - 0.25) * 0.5)
    assert not torch.equal(vae.encode(images, noise), vae.encode(images, None))


@torch.no_grad()
def test_decode_undoes_the_scale(saved):
    folder, model = saved
    latents = torch.randn(2, 4, 8, 6)
    expected = model.decode(latents / 0.5 + 0.25).sample.clamp(-1, 1)
    torch.testing.assert_close(build(folder).decode(latents), expected)
    assert float(build(folder, scale=1e-3).decode(latents * 10).abs().max()) <= 1


def test_no_gradient_no_autocast_and_precision(saved, images):
    folder, _ = saved
    exact, coarse = build(folder), build(folder, dtype="bf16")
    reference = exact.encode(images, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.encode(images, None), reference)
    latents = coarse.encode(images, None)
    assert latents.dtype == coarse.decode(latents).dtype == torch.float32
    assert not latents.requires_grad
    assert {p.dtype for p in coarse._model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in coarse._model.parameters())
    assert 0 < float((latents - reference).norm() / reference.norm()) < 0.05


@pytest.mark.parametrize(
    ("name", "config_scale", "scale"),
    [
        ("somebodys", 0.3, 0.3),
        ("somebodys", None, 0.18215),
        ("sd-vae-ft-ema", None, 0.18215),
        ("sd-vae-ft-mse", 0.3, 0.18215),
        ("sdxl-vae", None, 0.13025),
        ("sdxl-vae", 0.18215, 0.13025),
        ("my-sdxl-tune", None, 0.13025),
        ("my-sdxl-tune", 0.18215, 0.13025),
        ("my-sdxl-tune", 0.2, 0.2),
        ("models--stabilityai--sdxl-vae/snapshots/0a1b", None, 0.13025),
        ("sdxl-base/vae", None, 0.13025),
    ],
)
def test_scale_of_known_and_unknown_models(saved, tmp_path, name, config_scale, scale):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    folder = copy(saved, tmp_path / name, scaling_factor=config_scale, shift_factor=None, _name_or_path=None)
    pixels = torch.zeros(1, 3, 8, 8)
    plain = build(folder, scale=1.0).encode(pixels, None)
    torch.testing.assert_close(build(folder).encode(pixels, None), plain * scale)


def test_overrides(saved, images):
    folder, model = saved
    mean = model.encode(images).latent_dist.mean.detach()
    torch.testing.assert_close(build(folder, scale=2.0, shift=-1.0).encode(images, None), (mean + 1) * 2)
    torch.testing.assert_close(build(folder, shift=0.0).encode(images, None), mean * 0.5)


def test_scale_a_channel(saved, tmp_path, images):
    means, stds = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 8.0]
    folder = copy(saved, tmp_path / "a", latents_mean=means, latents_std=stds)
    mean = saved[1].encode(images).latent_dist.mean.detach()
    expected = (mean - torch.tensor(means).view(4, 1, 1)) * 0.5 / torch.tensor(stds).view(4, 1, 1)
    vae = build(folder)
    torch.testing.assert_close(vae.encode(images, None), expected)
    assert "one a channel" in vae.describe()


def test_sixteen_channels_need_a_scale(saved, tmp_path):
    folder = copy(saved, tmp_path / "a", latent_channels=16, scaling_factor=None)
    with pytest.raises(ValueError, match=r"vae\.scale: the config of .* has no scaling_factor"):
        build(folder, in_channels=16)


def test_pipeline_folder(saved, tmp_path, images):
    copy(saved, tmp_path / "vae")
    assert torch.equal(build(tmp_path).encode(images, None), build(saved[0]).encode(images, None))


def test_memory_saving(saved):
    folder, _ = saved
    vae = build(folder)
    vae.enable_tiling()
    vae.enable_slicing()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1  # one tile: the same numbers
    torch.testing.assert_close(vae.encode(pixels, None), build(folder).encode(pixels, None))
    assert vae.decode(vae.encode(torch.zeros(1, 3, 48, 32), None)).shape == (1, 3, 48, 32)


def test_loading_is_quiet(saved, capfd, caplog):
    build(saved[0])
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def test_inputs_of_other_shapes(saved):
    vae = build(saved[0])
    with pytest.raises(ValueError, match=r"multiples of 4 pixels, not 30 × 24"):
        vae.encode(torch.zeros(1, 3, 30, 24), None)
    with pytest.raises(ValueError, match=r"multiples of 4 pixels, not 32 × 22"):
        vae.encode(torch.zeros(1, 3, 32, 22), None)
    with pytest.raises(ValueError, match=r"pixels \(N, 3, H, W\)"):
        vae.encode(torch.zeros(1, 1, 8, 8), None)
    with pytest.raises(ValueError, match=r"latents' shape \(1, 4, 2, 2\), not \(1, 4, 8, 8\)"):
        vae.encode(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"latents \(N, 4, h, w\)"):
        vae.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples"):
        vae.latent_shape(0, 4)


def test_settings_that_make_no_sense(saved):
    with pytest.raises(ValueError, match=r"latents of 4 channels but the diffusion model takes 3; set model\.in_ch"):
        build(saved[0], in_channels=3)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            build(scale=scale)
    with pytest.raises(ValueError, match="shift"):
        build(shift=float("inf"))


def weights_of(folder):
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "changes", "told"),
    [
        (lambda folder: weights_of(folder).write_bytes(b"\x07" * 100), {}, "no readable diffusers AutoencoderKL"),
        (lambda folder: weights_of(folder).unlink(), {}, "no readable diffusers AutoencoderKL"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, "no readable diffusers AutoencoderKL"),
        (lambda folder: (folder / "config.json").unlink(), {}, "no readable diffusers AutoencoderKL"),
        (None, {"_class_name": "AutoencoderTiny"}, "of the kind AutoencoderTiny"),
        (None, {"_class_name": None}, "of the kind unknown"),
        (None, {"layers_per_block": 2}, "lacks weights"),
        (None, {"block_out_channels": [16, 8, 8]}, "other shapes"),
    ],
)
def test_damaged_folders(saved, tmp_path, capfd, damage, changes, told):
    folder = copy(saved, tmp_path / "a", **changes)
    if damage:
        damage(folder)
    with pytest.raises(ValueError, match=told) as caught:
        build(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_pytorch_weights_without_code(saved, tmp_path, images):
    folder = copy(saved, tmp_path / "a")
    weights_of(folder).unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(saved[1].state_dict(), path)
    assert torch.equal(build(folder).encode(images, None), build(saved[0]).encode(images, None))

    class Trap:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    torch.save({"weight": Trap()}, path)
    with pytest.raises(ValueError, match="no readable diffusers AutoencoderKL"):
        build(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("stabilityai/sd-vae-ft-ema", "not on this machine and the hub cannot be reached"),
    ],
)
def test_missing_models(name, told):
    with pytest.raises(ValueError, match=told):
        build(name)
