"""Laws of time, the shift, and the interval."""

import pytest
import torch

from lumina.flow.path import PATHS, PREDICTIONS, get_path
from lumina.flow.time import TIME_LAWS, TimeLaw, default_epsilon, interval, shift_time

U = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


def test_shift_by_hand_and_its_direction():
    # m = 4 takes the middle to 0.5/(0.5 + 4 − 2) = 0.2, towards noise.
    t = shift_time(torch.tensor([0.0, 0.5, 0.8, 1.0]), 4.0)
    torch.testing.assert_close(t, torch.tensor([0.0, 0.2, 0.5, 1.0]))
    back = shift_time(t, 0.25)
    torch.testing.assert_close(back, torch.tensor([0.0, 0.5, 0.8, 1.0]))
    torch.testing.assert_close(shift_time(U, 1.0), U)
    assert shift_time(torch.tensor([1.0]), 0.3).item() == 1


def test_uniform_draws_are_the_times():
    torch.testing.assert_close(TimeLaw().from_uniform(U), U.float(), rtol=0, atol=1e-7)


def test_logit_normal_is_the_sigmoid_of_a_normal():
    t = TimeLaw("logit_normal").from_uniform(U).double()
    logits = torch.logit(t)
    # Grid points as draws: moments of a standard normal to the grid's accuracy.
    assert logits.mean().item() == pytest.approx(0, abs=1e-4)
    assert logits.var().item() == pytest.approx(1, abs=2e-3)
    assert (logits < 1.0).double().mean().item() == pytest.approx(0.8413, abs=1e-3)


def test_logit_normal_of_a_float32_draw_is_computed_in_float64():
    u = torch.tensor([1 - 2.0**-24], dtype=torch.float32)
    expected = torch.sigmoid(torch.special.ndtri(u.double())).float()
    assert torch.equal(TimeLaw("logit_normal").from_uniform(u), expected)


@pytest.mark.parametrize("law", TIME_LAWS)
@pytest.mark.parametrize("shift", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-5, 1e-3, 0.1, 0.3])
def test_times_fill_the_interval_and_keep_to_it(law, shift, epsilon):
    u = torch.cat([torch.zeros(1, dtype=torch.float64), U, torch.ones(1, dtype=torch.float64)])
    t = TimeLaw(law, shift, epsilon).from_uniform(u)
    assert t.dtype == torch.float32
    assert (t.diff() >= 0).all()
    # Compared as exact numbers: rounding must not carry a time out of the interval.
    assert t[0].item() >= epsilon
    assert t[-1].item() <= 1 - epsilon
    assert t[0].item() == pytest.approx(epsilon, rel=1e-6, abs=1e-12)
    assert t[-1].item() == pytest.approx(1 - epsilon, abs=2e-7)


def test_shift_comes_before_the_interval():
    t = TimeLaw("uniform", 4.0, 0.1).from_uniform(torch.tensor([0.5]))
    assert t.item() == pytest.approx(0.1 + 0.8 * 0.2)


def test_a_tiny_epsilon_survives_float32():
    assert interval(1e-9, torch.float32) == (pytest.approx(1e-9), 1 - 2.0**-24)


def test_default_epsilons():
    expected = {
        ("linear", "velocity"): (0.0, 0.0, 1e-3),
        ("gvp", "velocity"): (0.0, 0.0, 1e-3),
        **{(path, prediction): (1e-3, 1e-3, 1e-3) for path in ("linear", "gvp") for prediction in ("noise", "score")},
        **{("vp", prediction): (1e-5, 1e-3, 1e-3) for prediction in PREDICTIONS},
    }
    assert len(expected) == len(PATHS) * len(PREDICTIONS)
    for (name, prediction), epsilons in expected.items():
        path = get_path(name)
        assert epsilons == (
            default_epsilon(path, prediction, "training"),
            default_epsilon(path, prediction, "sampling"),
            default_epsilon(path, prediction, "sampling", sde=True),
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("logitnormal",), r"^unknown time_law 'logitnormal'; did you mean logit_normal\?$"),
        (("uniform", 0.0), r"^time_shift must be a positive number, not 0.0; 1 is no shift$"),
        (("uniform", float("inf")), r"^time_shift must be a positive number, not inf"),
        (("uniform", 1.0, 0.5), r"^epsilon must lie in \[0, 0.5\), not 0.5; times keep that distance"),
        (("uniform", 1.0, -0.1), r"^epsilon must lie in \[0, 0.5\), not -0.1"),
        (("uniform", 1.0, float("nan")), r"^epsilon must lie in \[0, 0.5\), not nan"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimeLaw(*arguments)


def test_unknown_stage():
    with pytest.raises(ValueError, match=r"^unknown stage 'train'; did you mean training\?$"):
        default_epsilon(get_path("vp"), "noise", "train")
