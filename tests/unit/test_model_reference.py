"""Flag-DiT against vectors computed by the public code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import build

FILE = Path(__file__).parents[1] / "fixtures" / "flag_dit_tiny.safetensors"
OUTPUT_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    with safe_open(FILE, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no dict


@pytest.fixture
def model(vectors) -> FlagDiT:
    with safe_open(FILE, framework="pt") as file:
        config = FlagDiTConfig.from_dict(json.loads(file.metadata()["config"]))
    weights = {key.removeprefix("weights/"): v.clone() for key, v in vectors.items() if key.startswith("weights/")}
    return build(config, weights, "the reference")


def captions(vectors, count=3):
    return {"cap_feats": vectors["in/cap_feats"][:count], "cap_mask": vectors["in/cap_mask"][:count]}


def test_a_batch(model, vectors):
    out = model(vectors["in/batch"], vectors["in/t"], **captions(vectors))
    torch.testing.assert_close(out, vectors["out/batch"], atol=OUTPUT_TOLERANCE, rtol=0)


def test_samples_of_unequal_sizes_in_one_call(model, vectors):
    out = model([vectors[f"in/ragged.{i}"] for i in range(3)], vectors["in/t"], **captions(vectors))
    for i in range(3):
        torch.testing.assert_close(out[i], vectors[f"out/ragged.{i}"], atol=OUTPUT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cfg", {}),
        ("cfg_ntk4_proportional_base24", {"ntk_factor": 4.0, "proportional_attn": True, "base_seqlen": 24}),
        ("cfg_ropescale2", {"rope_scaling_factor": 2.0}),
    ],
)
def test_guidance_and_extrapolation(model, vectors, name, options):
    latent = vectors["in/cfg_latent"]
    doubled = torch.cat((latent, torch.full_like(latent, 7.0)))  # the second half is ignored
    out = model.forward_with_cfg(
        doubled, vectors["in/cfg_t"], **captions(vectors, 2), cfg_scale=4.0, guided_channels=3, **options
    )
    torch.testing.assert_close(out, vectors[f"out/{name}"], atol=OUTPUT_TOLERANCE, rtol=0)


def test_all_channels_are_guided_by_default(model, vectors):
    latent = vectors["in/cfg_latent"].repeat(2, 1, 1, 1)
    out = model.forward_with_cfg(latent, vectors["in/cfg_t"], **captions(vectors, 2), cfg_scale=4.0)
    conditional, unconditional = model(latent, vectors["in/cfg_t"], **captions(vectors, 2))
    torch.testing.assert_close(out[0], unconditional + 4.0 * (conditional - unconditional), atol=1e-5, rtol=0)
    assert torch.equal(out[0], out[1])


def test_extrapolation_leaves_nothing_behind(model, vectors):
    """Public code keeps its NTK table after it is switched off."""
    latent = vectors["in/cfg_latent"].repeat(2, 1, 1, 1)
    arguments = {"x": latent, "t": vectors["in/cfg_t"], **captions(vectors, 2), "cfg_scale": 4.0}
    before = model.forward_with_cfg(**arguments)
    changed = model.forward_with_cfg(**arguments, ntk_factor=8.0, proportional_attn=True, base_seqlen=16)
    assert not torch.equal(before, changed)
    assert torch.equal(before, model.forward_with_cfg(**arguments))


def test_loss_and_every_gradient(model, vectors):
    data = [vectors[f"in/ragged.{i}"] for i in range(3)]
    noise = [vectors[f"in/noise.{i}"] for i in range(3)]
    t = vectors["in/t"]
    x_t = [t[i] * data[i] + (1 - t[i]) * noise[i] for i in range(3)]
    out = model(x_t, t, **captions(vectors))
    loss = torch.stack([(out[i] - (data[i] - noise[i])).square().mean() for i in range(3)]).mean()
    torch.testing.assert_close(loss, vectors["out/loss"], atol=2e-6, rtol=0)

    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = vectors[f"grad/{name}"]
        if name == "pad_token":
            assert parameter.grad is None  # read by nothing
            continue
        if name.endswith("ky_norm.bias"):
            assert parameter.grad.abs().max() < 1e-9  # zero in exact arithmetic
            continue
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: relative L2 {error:.1e}"
        compared += 1
    assert compared == len([key for key in vectors if key.startswith("grad/")]) - 3


def test_bfloat16_stays_near_float32(model, vectors):
    out = model.to(torch.bfloat16)(vectors["in/batch"], vectors["in/t"], **captions(vectors))
    assert out.dtype == torch.float32  # the form the samples came in
    error = (out - vectors["out/batch"]).norm() / vectors["out/batch"].norm()
    assert 1e-4 < error < 2e-2
