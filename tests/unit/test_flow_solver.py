"""Solvers: evaluations, orders, grids, steps by hand, refusals, inversion and likelihood."""

import itertools
import math

import pytest
import torch

from lumina.flow.field import Field
from lumina.flow.loss import Objective
from lumina.flow.path import DIFFUSIONS, PATHS, PREDICTIONS
from lumina.flow.sde import LAST_STEPS
from lumina.flow.solver import (
    ADAPTIVE_SOLVERS,
    FIXED_STEP_SOLVERS,
    ODE_SOLVERS,
    SDE_SOLVERS,
    SOLVERS,
    invert,
    log_likelihood,
    sample,
)

MEAN, SPREAD = torch.tensor([0.7, -1.1], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)
Z = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gaussian(x, t):
    """The exact velocity on the linear path of data N(MEAN, SPREAD²); its flow is z -> MEAN + SPREAD·z."""
    t = t[:, None]
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


class Watch:
    """A model that notes the times and dtype it is called with."""

    def __init__(self, model=lambda x, t: 0.1 * x):
        self.model, self.times, self.dtypes = model, [], set()

    def __call__(self, x, t):
        assert t.shape == x.shape[:1]
        self.times.append(t[0].item())
        self.dtypes.add(x.dtype)
        return self.model(x, t)


@pytest.mark.parametrize(
    ("solver", "each"),
    [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("sde_euler", 1), ("sde_heun", 2)],
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_of_n_steps(solver, each, steps):
    watch = Watch()
    sample(watch, Z, Objective.build(), solver=solver, steps=steps)
    assert len(watch.times) == each * steps


@pytest.mark.parametrize(("solver", "each"), [("sde_euler", 1), ("sde_heun", 2)])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_a_last_step_is_one_of_the_steps_and_one_evaluation(solver, each, last_step):
    watch = Watch()
    sample(watch, Z, Objective.build(), solver=solver, steps=6, last_step=last_step)
    assert len(watch.times) == 5 * each + 1
    assert watch.times[-1] == pytest.approx(0.96)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    # dx/dt = −(1 + 2t)·x² from x0 ends at 1/(1/x0 + 2). (`gaussian` lets midpoint's leading error cancel.)
    start = Z.abs() + 0.5
    exact = 1 / (1 / start + 2)

    def model(x, t):
        return -(1 + 2 * t)[:, None] * x**2

    errors = [
        (sample(model, start, Objective.build(), solver=solver, steps=steps) - exact).abs().max().item()
        for steps in (40, 80, 160)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", ADAPTIVE_SOLVERS)
def test_adaptive_solvers_keep_their_tolerance(solver):
    exact = MEAN + SPREAD * Z
    calls = []
    for tolerance in (1e-4, 1e-7):
        watch = Watch(gaussian)
        points = sample(watch, Z, Objective.build(), solver=solver, rtol=tolerance, atol=tolerance)
        assert (points - exact).abs().max().item() < 10 * tolerance
        calls.append(len(watch.times))
    assert calls[0] < calls[1]
    assert max(watch.times) <= 1  # torchdiffeq by itself steps beyond the end


@pytest.mark.parametrize(("solver", "order"), [("sde_euler", 1), ("sde_heun", 2)])
def test_weak_order_of_the_sde_solvers(solver, order, monkeypatch):
    # For a field linear in x the variance reached is the sum of the squared responses to each unit of noise alone, so
    # nothing is left to chance: sample 0 starts at the prior's spread, sample j gets the noise of step j only.
    def variance(t):
        return (2.0 * t) ** 2 + (1 - t) ** 2

    def model(x, t):
        return ((4 * t - (1 - t)) / variance(t))[:, None] * x

    def reached(steps):
        kicks = iter(torch.eye(steps + 1, dtype=torch.float64)[1:, :, None])
        monkeypatch.setattr("lumina.flow.sde.Noises.like", lambda self, x: next(kicks))
        x = torch.zeros(steps + 1, 1, dtype=torch.float64)
        x[0] = variance(1e-3) ** 0.5
        return sample(model, x, Objective.build(), solver=solver, steps=steps, diffusion="decreasing").square().sum()

    errors = [abs(reached(steps).item() - variance(1 - 1e-3)) for steps in (100, 200)]
    assert math.log2(errors[0] / errors[1]) > order - 0.1  # measured: 0.99 and 2.3


@pytest.mark.parametrize("path", ["linear", pytest.param("gvp", marks=pytest.mark.slow), "vp"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("epsilon", [None, 1e-9, 0.1])
def test_every_evaluation_lies_in_the_interval_and_all_is_finite(path, prediction, solver, epsilon):
    default = 0.0 if path != "vp" and prediction == "velocity" and solver in ODE_SOLVERS else 1e-3
    edge = default if epsilon is None else epsilon
    watch = Watch(lambda x, t: torch.tanh(x))
    steps = None if solver in ADAPTIVE_SOLVERS else 5
    # A net that knows nothing takes an adaptive solver very small steps near an end where its velocity is infinite.
    if solver in ADAPTIVE_SOLVERS and epsilon == 1e-9:
        watch = Watch(lambda x, t: Objective.build(path, prediction).path.target(prediction, 0 * x, x, t))
    points = sample(watch, Z.float(), Objective.build(path, prediction), solver=solver, steps=steps, epsilon=epsilon)
    assert points.isfinite().all()
    assert min(watch.times) >= edge
    assert max(watch.times) <= 1 - edge
    assert min(watch.times) == pytest.approx(edge, rel=1e-5)
    if solver not in ("euler", "midpoint", "sde_euler"):
        assert max(watch.times) == pytest.approx(1 - edge, abs=1e-6)


@pytest.mark.parametrize("last_step", [None, *LAST_STEPS])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_sde_is_finite_at_the_ends(last_step, diffusion, path, prediction):
    for solver in SDE_SOLVERS:
        points = sample(
            Watch(lambda x, t: torch.tanh(x)),
            Z.float(),
            Objective.build(path, prediction),
            solver=solver,
            steps=4,
            diffusion=diffusion,
            last_step=last_step,
            epsilon=1e-6,
        )
        assert points.isfinite().all()


def test_rounding_never_carries_a_time_out_of_the_interval():
    field = Field.build(gaussian, Z, Objective.build(), 0.1, 1.0)
    assert field.at(Z, math.nextafter(0.9, 1.0)).tolist() == [0.9] * 16
    assert field.at(Z, math.nextafter(0.1, 0.0)).tolist() == [0.1] * 16


def test_the_grid_is_the_shifted_one():
    watch = Watch()
    sample(watch, Z, Objective.build(), steps=4, time_shift=4.0, epsilon=0.1)
    expected = [0.1 + 0.8 * s / (s + 4 - 4 * s) for s in (0, 0.25, 0.5, 0.75)]
    assert watch.times == pytest.approx(expected)


def test_euler_maruyama_and_its_last_steps_by_hand():
    # Linear path, velocity prediction v = 0.5: score = (t·v − x)/(1 − t), D = 0.3·(1 − t).
    generator = torch.Generator().manual_seed(3)
    x = Z
    for t, after in ((0.1, 0.45), (0.45, 0.8)):
        h, d = after - t, min(0.3 * (1 - t), 0.5 * (1 - after) ** 2 / (after - t))
        score = (t * 0.5 - x) / (1 - t)
        x = x + h * (0.5 + d * score) + math.sqrt(2 * d * h) * torch.randn(Z.shape, generator=generator, dtype=Z.dtype)
    score, d = (0.8 * 0.5 - x) / 0.2, min(0.3 * 0.2, 0.5 * 0.2**2 / 0.2)
    expected = {
        "mean": x + 0.2 * (0.5 + d * score),
        "euler": x + 0.2 * 0.5,
        "tweedie": x / 0.8 + 0.2**2 / 0.8 * score,
    }
    for last_step in LAST_STEPS:
        actual = sample(
            lambda x, t: torch.full_like(x, 0.5),
            Z,
            Objective.build(),
            solver="sde_euler",
            steps=3,
            epsilon=0.1,
            diffusion="linear",
            diffusion_norm=0.3,
            last_step=last_step,
            last_step_size=0.2,
            generator=torch.Generator().manual_seed(3),
        )
        torch.testing.assert_close(actual, expected[last_step])


def test_the_noise_of_an_sde_comes_from_its_generator():
    def run(generator):
        return sample(Watch(), Z, Objective.build(), solver="sde_euler", steps=3, generator=generator)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(run(seeded(1)), run(seeded(1)))
    assert not torch.equal(run(seeded(1)), run(seeded(2)))
    whole = run([seeded(i) for i in range(16)])
    alone = sample(Watch(), Z[5:6], Objective.build(), solver="sde_euler", steps=3, generator=[seeded(5)])
    torch.testing.assert_close(whole[5:6], alone)


def test_the_model_sees_the_dtype_of_the_noise_and_sums_are_float32():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        watch = Watch(lambda x, t: torch.full_like(x, 1e-3))
        points = sample(watch, torch.ones(2, 3, dtype=dtype), Objective.build(), steps=100)
        assert watch.dtypes == {dtype}
        assert points.dtype == dtype
    watch = Watch(lambda x, t: torch.full_like(x, 0.01))
    # A hundred additions of 0.0001 to 1 are all lost in bfloat16; their sum is not.
    assert sample(watch, torch.ones(1, 1, dtype=torch.bfloat16), Objective.build(), steps=100).item() > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_callback_sees_every_step_and_can_end_the_run(solver):
    seen = []
    adaptive = solver in ADAPTIVE_SOLVERS
    options = {} if adaptive else {"steps": 6}
    if solver in SDE_SOLVERS:
        options["last_step"] = "mean"
    points = sample(
        Watch(gaussian), Z, Objective.build(), solver=solver, callback=lambda *step: seen.append(step), **options
    )
    assert [step[0] for step in seen] == list(range(1, len(seen) + 1))
    assert {step[1] for step in seen} == ({None} if adaptive else {6})
    assert torch.equal(seen[-1][2], points)
    assert len({step[2].sum().item() for step in seen}) == len(seen)

    def cancel(step, steps, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(Watch(gaussian), Z, Objective.build(), solver=solver, callback=cancel, **options)


@pytest.mark.parametrize(
    ("solver", "options", "sentence"),
    [
        ("eular", {}, r"^unknown solver 'eular'; did you mean euler\?$"),
        ("euler", {"steps": 0}, r"^steps must be at least 1, not 0$"),
        ("dopri5", {"steps": 20}, r"^steps is for euler and .* and sde_heun; solver dopri5 has no use for it$"),
        ("heun", {"rtol": 1e-3}, r"^rtol is for dopri5 and dopri8; solver heun has no use for it$"),
        ("sde_heun", {"atol": 1e-3}, r"^atol is for dopri5 and dopri8; solver sde_heun has no use for it$"),
        ("rk4", {"diffusion": "sigma"}, r"^diffusion is for sde_euler and sde_heun; solver rk4 has no use for it$"),
        ("rk4", {"diffusion_norm": 1.0}, r"^diffusion_norm is for sde_euler and sde_heun; solver rk4"),
        ("euler", {"last_step": "mean"}, r"^last_step is for sde_euler and sde_heun; solver euler"),
        ("dopri8", {"last_step_size": 0.1}, r"^last_step_size is for sde_euler and sde_heun; solver dopri8"),
        ("sde_euler", {"diffusion": "sbdm"}, r"^unknown diffusion 'sbdm'; did you mean SBDM\?$"),
        ("sde_euler", {"diffusion_norm": 0.0}, r"^diffusion_norm must be a positive number, not 0.0; without noise"),
        ("sde_euler", {"last_step": "Mean"}, r"^unknown last_step 'Mean'; did you mean mean\?$"),
        ("sde_euler", {"last_step_size": 0.1}, r"^last_step_size needs a last_step, one of mean, tweedie, euler$"),
        ("sde_euler", {"last_step": "mean", "last_step_size": 0.7}, r"^last_step_size must lie between 0 and 0.5"),
        ("sde_euler", {"last_step": "mean", "epsilon": 0.1}, r"^last_step_size must be at least epsilon \(0.1\)"),
        ("sde_euler", {"last_step": "mean", "steps": 1}, r"^steps must be at least 2 with a last step"),
        ("sde_euler", {"epsilon": 0.0}, r"^epsilon must be above 0: the SDE of a velocity .* infinite at t = 1;"),
        ("sde_euler", {"generator": [torch.Generator()]}, r"^1 generators were given for 16 samples; give one"),
        ("euler", {"epsilon": 0.5}, r"^epsilon must lie in \[0, 0.5\), not 0.5"),
        ("euler", {"time_shift": 0.0}, r"^time_shift must be a positive number, not 0.0"),
        ("dopri5", {"rtol": 0.0}, r"^rtol must be at least 9e-16 in torch.float64"),
    ],
)
def test_refusals(solver, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(Watch(), Z, Objective.build(), solver=solver, **options)


def test_epsilon_zero_is_refused_where_the_velocity_is_infinite():
    for path, prediction, end in (("linear", "noise", 0), ("gvp", "score", 0), ("vp", "noise", 1)):
        with pytest.raises(ValueError, match=rf"the ODE of a {prediction} prediction .* is infinite at t = {end};"):
            sample(Watch(), Z, Objective.build(path, prediction), epsilon=0.0)
    for path, prediction in (("linear", "velocity"), ("vp", "velocity"), ("vp", "score")):
        assert sample(Watch(), Z, Objective.build(path, prediction), solver="heun", epsilon=0.0).isfinite().all()


def test_a_model_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"^the model returned shape \(16, 4\) for x of shape \(16, 2\)$"):
        sample(lambda x, t: torch.cat([x, x], 1), Z, Objective.build())


def test_adaptive_solvers_say_why_they_stop():
    with pytest.raises(RuntimeError, match=r"^the model's velocity at t = 0 is not finite, so dopri5 cannot go on$"):
        sample(lambda x, t: x / 0, Z, Objective.build(), solver="dopri5")
    with pytest.raises(RuntimeError, match=r"^dopri5 finds no steps long enough with rtol 1e-05, atol 1e-05; raise"):
        sample(lambda x, t: torch.randn_like(x) * 1e15, Z.float(), Objective.build(), solver="dopri5")


@pytest.mark.parametrize("solver", [*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS])
def test_inversion_finds_the_noise(solver):
    steps = None if solver in ADAPTIVE_SOLVERS else 1000 if solver == "euler" else 200
    data = MEAN + SPREAD * Z
    noise = invert(gaussian, data, Objective.build(), solver=solver, steps=steps, time_shift=2.0)
    torch.testing.assert_close(noise, Z, rtol=0, atol=1e-2 if solver == "euler" else 1e-3)
    back = sample(gaussian, noise, Objective.build(), solver=solver, steps=steps, time_shift=2.0)
    torch.testing.assert_close(back, data, rtol=0, atol=2e-2 if solver == "euler" else 1e-3)


def test_inversion_refuses_an_sde():
    with pytest.raises(ValueError, match=r"^unknown ODE solver 'sde_heun'; did you mean heun\?$"):
        invert(gaussian, Z, Objective.build(), solver="sde_heun")


NORMAL = torch.distributions.Normal(MEAN, SPREAD)


def test_exact_log_likelihood_is_the_gaussian_density():
    data = MEAN + SPREAD * Z
    expected = NORMAL.log_prob(data).sum(1)
    for options in ({}, {"solver": "rk4", "steps": 100}, {"time_shift": 3.0}):
        actual = log_likelihood(gaussian, data, Objective.build(), trace="exact", **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_log_likelihood_of_other_shapes_and_predictions():
    # N(0, I) on the GVP path: the noise given x is sigma·x and the density stays as it is.
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)

    def model(x, t):
        return torch.cos(math.pi * t / 2).reshape(-1, 1, 1, 1) * x

    actual = log_likelihood(model, x, Objective.build("gvp", "noise"), trace="exact")
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_hutchinson_is_unbiased_and_exact_for_a_diagonal_jacobian():
    data, generator = MEAN + SPREAD * Z, torch.Generator().manual_seed(0)
    # The Jacobian of `gaussian` is diagonal, where sign vectors have no variance.
    actual = log_likelihood(gaussian, data, Objective.build(), generator=generator)
    torch.testing.assert_close(actual, NORMAL.log_prob(data).sum(1), rtol=0, atol=1e-3)

    turn = torch.tensor([[0.0, 1.0], [0.6, 0.0]], dtype=torch.float64)  # trace 0, and the estimate is ±1.6

    def model(x, t):
        return x @ turn

    exact = log_likelihood(model, data[:1], Objective.build(), trace="exact")
    many = log_likelihood(model, data[:1].expand(4000, 2), Objective.build(), generator=generator, atol=1e-3)
    assert many.std().item() == pytest.approx(1.6, abs=0.01)
    assert many.mean().item() == pytest.approx(exact.item(), abs=0.1)  # four standard errors
    averaged = log_likelihood(model, data[:1].expand(1000, 2), Objective.build(), probes=16, generator=generator)
    assert averaged.std().item() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"trace": "exact", "probes": 2}, r"^probes is for the hutchinson trace; an exact trace takes none$"),
        ({"probes": 0}, r"^probes must be at least 1, not 0$"),
        ({"trace": "hutchison"}, r"^unknown trace 'hutchison'; did you mean hutchinson\?$"),
        ({"solver": "sde_euler"}, r"^unknown ODE solver 'sde_euler'; did you mean euler\?$"),
    ],
)
def test_likelihood_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        log_likelihood(gaussian, Z, Objective.build(), **options)
