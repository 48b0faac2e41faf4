"""Paths against vectors of the public code, against autograd, and at the ends of time."""

from pathlib import Path as File

import pytest
import torch
from safetensors.torch import load_file

from lumina.flow.path import DIFFUSIONS, PATHS, PREDICTIONS, get_path

VECTORS = load_file(File(__file__).parents[1] / "fixtures" / "transport.safetensors")
DATA, NOISE, T = (VECTORS[f"in/{name}"] for name in ("x1", "x0", "t"))


def close(actual, expected):
    # Measured: relative 3.6e-6 at most, where the public code subtracts nearly equal numbers.
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("name", PATHS)
def test_reference_interpolation_and_conversions(name):
    path, velocity, x = get_path(name), VECTORS[f"{name}/velocity"], VECTORS[f"{name}/xt"]
    close(path.interpolate(DATA, NOISE, T), x)
    close(path.velocity(DATA, NOISE, T), VECTORS[f"{name}/ut"])
    close(path.score_from_velocity(velocity, x, T), VECTORS[f"{name}/score_from_velocity"])
    close(path.noise_from_velocity(velocity, x, T), VECTORS[f"{name}/noise_from_velocity"])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("form", DIFFUSIONS)
def test_reference_diffusions(name, form):
    expected = VECTORS[f"{name}/diffusion.{form}"].flatten()
    close(get_path(name).diffusion(form, T), expected)
    close(get_path(name).diffusion(form, T, 0.5), 0.5 * expected)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_and_closed_forms(name):
    path = get_path(name)
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64).requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)
    (alpha_dot,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
    (sigma_dot,) = torch.autograd.grad(sigma.sum(), t, retain_graph=True)
    rate = alpha_dot / alpha
    variance = rate * sigma**2 - sigma * sigma_dot
    for actual, expected in (
        (path.alpha_dot(t), alpha_dot),
        (path.sigma_dot(t), sigma_dot),
        (path.drift_rate(t), rate),
        (path.drift_variance(t), variance),
        (path.drift_deviation(t), variance / sigma),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_of_every_prediction_means_the_velocity_and_the_score(name, prediction):
    path = get_path(name)
    t = torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64)
    data, noise = DATA.double(), NOISE.double()
    x, output = path.interpolate(data, noise, t), path.target(prediction, data, noise, t)
    torch.testing.assert_close(path.to_velocity(prediction, output, x, t), path.velocity(data, noise, t))
    torch.testing.assert_close(path.to_score(prediction, output, x, t), path.target("score", data, noise, t))


@pytest.mark.parametrize("name", PATHS)
def test_float32_keeps_its_digits_near_the_ends(name):
    path = get_path(name)
    t = torch.tensor([1e-5, 1e-3, 1 - 1e-3, 1 - 1e-5])
    for method in ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift_rate", "drift_variance", "drift_deviation"):
        single, double = getattr(path, method)(t), getattr(path, method)(t.double())
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_what_is_finite_at_both_ends(name):
    path, t = get_path(name), torch.tensor([0.0, 1.0, 0.0, 1.0])
    x = path.interpolate(DATA, NOISE, t)
    assert torch.equal(x[1], DATA[1])
    assert torch.allclose(x[0], NOISE[0], atol=0.02)  # VP leaves 0.0066 of the data
    assert path.noise_from_velocity(DATA - NOISE, x, t).isfinite().all()
    finite = {form: path.diffusion(form, torch.tensor([0.0, 1.0])).isfinite().tolist() for form in DIFFUSIONS}
    assert finite.pop("SBDM") == [name == "vp", True]
    assert all(ends == [True, True] for ends in finite.values())


def test_half_precision_data_are_mixed_in_float32():
    x = get_path("vp").interpolate(DATA.bfloat16(), NOISE.bfloat16(), T)
    assert x.dtype == torch.float32
    expected = get_path("vp").interpolate(DATA.bfloat16().float(), NOISE.bfloat16().float(), T)
    assert torch.equal(x, expected)
    t = T.bfloat16()
    for path in map(get_path, PATHS):
        assert torch.equal(path.interpolate(DATA, NOISE, t), path.interpolate(DATA, NOISE, t.float()))
        assert torch.equal(path.velocity(DATA, NOISE, t), path.velocity(DATA, NOISE, t.float()))
        assert torch.equal(path.to_velocity("noise", NOISE, DATA, t), path.to_velocity("noise", NOISE, DATA, t.float()))


def test_one_time_a_token():
    path, t = get_path("gvp"), torch.rand(6)
    data, noise = torch.randn(6, 5), torch.randn(6, 5)
    for i in range(6):
        row = slice(i, i + 1)
        expected = path.alpha(t[row]) * data[row] + path.sigma(t[row]) * noise[row]
        torch.testing.assert_close(path.interpolate(data, noise, t)[row], expected)


def test_unknown_names_say_the_nearest():
    with pytest.raises(ValueError, match=r"^unknown path 'lineer'; did you mean linear\?$"):
        get_path("lineer")
    with pytest.raises(ValueError, match=r"^unknown path 'xyz'; it is one of linear, gvp, vp$"):
        get_path("xyz")
    with pytest.raises(ValueError, match=r"^unknown diffusion 'sbdm'; did you mean SBDM\?$"):
        get_path("vp").diffusion("sbdm", T)
    with pytest.raises(ValueError, match=r"^unknown prediction 'velocty'; did you mean velocity\?$"):
        get_path("vp").to_velocity("velocty", DATA, DATA, T)
