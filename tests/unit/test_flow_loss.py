"""Objectives by hand, and the mean over packed samples against float64 loops."""

import math

import pytest
import torch

from lumina.flow.loss import WEIGHTINGS, Objective, per_sample_mean
from lumina.flow.path import PATHS, PREDICTIONS

OFFERED = [
    (path, prediction, weighting)
    for path in PATHS
    for prediction in PREDICTIONS
    for weighting in WEIGHTINGS
    if prediction != "velocity" or weighting == "none"
]
# By hand: (alpha, sigma, alpha', sigma') at t = 0.3; VP through beta(0.3) = 0.1 + 0.7·19.9.
LOG_ALPHA = -0.25 * 0.49 * 19.9 - 0.5 * 0.7 * 0.1
ALPHA = math.exp(LOG_ALPHA)
SIGMA = math.sqrt(1 - ALPHA**2)
RATE = 0.5 * (0.1 + 0.7 * 19.9)
COEFFICIENTS = {
    "linear": (0.3, 0.7, 1.0, -1.0),
    "gvp": (
        math.sin(0.15 * math.pi),
        math.cos(0.15 * math.pi),
        0.5 * math.pi * math.cos(0.15 * math.pi),
        -0.5 * math.pi * math.sin(0.15 * math.pi),
    ),
    "vp": (ALPHA, SIGMA, RATE * ALPHA, -RATE * ALPHA**2 / SIGMA),
}


@pytest.mark.parametrize(("path", "prediction", "weighting"), OFFERED)
def test_squared_error_by_hand(path, prediction, weighting):
    alpha, sigma, alpha_dot, sigma_dot = COEFFICIENTS[path]
    generator = torch.Generator().manual_seed(0)
    output, data, noise = (torch.randn(3, 5, generator=generator) for _ in range(3))
    drift_variance = alpha_dot / alpha * sigma**2 - sigma * sigma_dot
    weight = {"none": 1.0, "velocity": (drift_variance / sigma) ** 2, "likelihood": drift_variance / sigma**2}
    expected = {
        "velocity": (output - alpha_dot * data - sigma_dot * noise) ** 2,
        "noise": (output - noise) ** 2,
        "score": (sigma * output + noise) ** 2,
    }[prediction] * weight[weighting]
    actual = Objective.build(path, prediction, weighting).squared_error(output, data, noise, torch.full((3,), 0.3))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_velocity_weighting_is_the_error_of_the_velocity(path, prediction):
    objective = Objective.build(path, prediction, "velocity")
    t = torch.tensor([0.1, 0.4, 0.9])
    output, data, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    x = objective.corrupt(data, noise, t)
    meant = objective.velocity(output, x, t) - objective.path.velocity(data, noise, t)
    torch.testing.assert_close(objective.squared_error(output, data, noise, t), meant**2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("path", "prediction", "weighting"), OFFERED)
@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_losses_and_gradients_are_finite_at_the_ends_of_time(path, prediction, weighting, law):
    objective = Objective.build(path, prediction, weighting, law)
    t = objective.draw_times(torch.tensor([0.0, 1e-30, 0.5, 1 - 2.0**-24, 1.0]))
    output = torch.randn(5, 4, requires_grad=True)
    error = objective.squared_error(output, torch.randn(5, 4), torch.randn(5, 4), t)
    error.sum().backward()
    assert error.isfinite().all()
    assert output.grad.isfinite().all()


def test_the_error_is_float32_whatever_comes_in():
    objective = Objective.build("linear", "velocity")
    output, data, noise = (torch.randn(4, 3) for _ in range(3))
    t = torch.rand(4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        inputs = [value.to(dtype) for value in (output, data, noise)]
        error = objective.squared_error(*inputs, t)
        assert error.dtype == torch.float32
        torch.testing.assert_close(error, objective.squared_error(*(value.float() for value in inputs), t))


def test_build_takes_the_fields_of_the_configuration():
    from lumina.config.schema import FlowConfig

    assert Objective.build(**FlowConfig().model_dump()) == Objective.build()
    objective = Objective.build("vp", "noise", "likelihood", "logit_normal", 2.0, 0.01)
    assert objective.time_law.epsilon == 0.01
    t = objective.draw_times(torch.rand(4096))
    assert t.min().item() >= 0.01
    assert t.max().item() <= 0.99


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"weighting": "velocity"},
            r"^weighting velocity is for noise and score predictions; a velocity prediction takes none$",
        ),
        (
            {"weighting": "likelyhood", "prediction": "noise"},
            r"^unknown weighting 'likelyhood'; did you mean likelihood\?$",
        ),
        ({"prediction": "nois"}, r"^unknown prediction 'nois'; did you mean noise\?$"),
        ({"path": "liner"}, r"^unknown path 'liner'; did you mean linear\?$"),
        (
            {"path": "vp", "epsilon": 0.0},
            r"^epsilon must be above 0 with a velocity prediction on the VP path, whose loss is infinite at an end",
        ),
        (
            {"prediction": "noise", "weighting": "likelihood", "epsilon": 0.0},
            r"^epsilon must be above 0 with weighting likelihood on the Linear path",
        ),
        ({"epsilon": 0.7}, r"^epsilon must lie in \[0, 0.5\), not 0.7"),
        ({"time_shift": -1.0}, r"^time_shift must be a positive number, not -1.0"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Objective.build(**options)


def packed(lengths, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    error = torch.rand(total, dim, generator=generator)
    valid = torch.rand(total, generator=generator) > 0.2
    return error, valid, torch.tensor(lengths)


def loop(error, valid, lengths):
    means, start = [], 0
    for length in lengths.tolist():
        rows = error.double()[start : start + length][valid[start : start + length]]
        means.append(rows.mean() if len(rows) else torch.zeros((), dtype=torch.float64))
        start += length
    return torch.stack(means)


def test_per_sample_mean_and_its_gradient_equal_float64_loops():
    error, valid, lengths = packed([7, 1, 40, 3, 64], 6)
    valid[7] = True
    scale = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])
    error.requires_grad_()
    mean = per_sample_mean(error, valid, lengths)
    torch.testing.assert_close(mean.double(), loop(error, valid, lengths), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad((mean * scale).sum(), error)
    (expected,) = torch.autograd.grad((loop(error, valid, lengths) * scale).sum(), error)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert (gradient[~valid] == 0).all()


def test_per_sample_mean_of_a_long_sample_keeps_its_digits():
    error, valid, lengths = packed([131072, 5], 4)
    torch.testing.assert_close(
        per_sample_mean(error, valid, lengths).double(), loop(error, valid, lengths), rtol=1e-5, atol=0
    )


def test_what_is_not_valid_does_not_count_even_if_it_is_nan():
    error = torch.tensor([[1.0, 3.0], [float("nan"), 1.0], [5.0, 7.0]])
    mean = per_sample_mean(error, torch.tensor([True, False, True]), torch.tensor([2, 1]))
    assert mean.tolist() == [2.0, 6.0]


def test_a_sample_without_valid_tokens_is_zero_and_plain_batches_have_lengths_of_one():
    error = torch.arange(6.0).reshape(3, 2)
    assert per_sample_mean(error, torch.tensor([False, True, True]), torch.tensor([1, 2])).tolist() == [0.0, 3.5]
    plain = per_sample_mean(error, torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.int64))
    assert plain.tolist() == [0.5, 2.5, 4.5]


def test_lengths_must_cover_the_sequence():
    with pytest.raises(ValueError, match=r"^lengths sum to 4, not to the 5 tokens of the sequence$"):
        per_sample_mean(torch.zeros(5, 2), torch.ones(5, dtype=torch.bool), torch.tensor([1, 3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_per_sample_mean_is_deterministic_on_cuda():
    error, valid, lengths = (value.cuda() for value in packed([3000, 1, 70000, 13], 64))
    error.requires_grad_()
    means, gradients = [], []
    for _ in range(5):
        mean = per_sample_mean(error, valid, lengths)
        means.append(mean.detach())
        gradients.append(torch.autograd.grad((mean**2).sum(), error)[0])
    assert all(torch.equal(means[0], mean) for mean in means)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    torch.testing.assert_close(
        means[0].cpu().double(), loop(error.cpu(), valid.cpu(), lengths.cpu()), rtol=1e-5, atol=0
    )
