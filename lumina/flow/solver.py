"""Sampling: from noise (t = 0) to data (t = 1) by an ODE or an SDE, back again, and the likelihood on the way.

The ODE is dx/dt = v; the SDE dx = (v + D·score)dt + sqrt(2D)dW has the same law at every time for any D(t) >= 0 (SiT,
arXiv 2401.08740, section 2). Solvers work in float32 or better; the network sees the dtype of the noise it was given.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.flow.field import Field, Model, working_precision
from lumina.flow.loss import Objective
from lumina.flow.path import check_choice
from lumina.flow.sde import SDE, Callback, Constraint, Generators, Noises

FIXED_STEP_SOLVERS = ("euler", "midpoint", "heun", "rk4")
ADAPTIVE_SOLVERS = ("dopri5", "dopri8")
SDE_SOLVERS = ("sde_euler", "sde_heun")
ODE_SOLVERS = FIXED_STEP_SOLVERS + ADAPTIVE_SOLVERS
SOLVERS = ODE_SOLVERS + SDE_SOLVERS
TRACES = ("exact", "hutchinson")
DEFAULT_STEPS = 50
MOST_STEPS = 10_000  # of an adaptive solver, tried ones included: a field that is not smooth must not take for ever

Slope = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def sample(
    model: Model,
    noise: Float[Tensor, "n ..."],
    objective: Objective,
    *,
    solver: str = "euler",
    steps: int | None = None,
    time_shift: float = 1.0,
    epsilon: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    diffusion: str | None = None,
    diffusion_norm: float | None = None,
    last_step: str | None = None,
    last_step_size: float | None = None,
    generator: Generators = None,
    start: float | None = None,
    constrain: Constraint | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "n ..."]:
    """Samples, of the shape and dtype of `noise` (standard normal draws).

    `model(x, t)` takes x (N, ...) and t (N,) and returns what it was trained to predict, of the shape of x.

    Args:
        solver: one of `SOLVERS`. N steps are N evaluations of the model for euler and sde_euler, 2N for midpoint and
            heun, 4N for rk4; sde_heun takes two a step. A last step is one of the N and takes one evaluation.
        steps: of the solvers with fixed steps (default 50); dopri5 and dopri8 choose their own.
        time_shift: m of `shift_time`, laid over the grid; the adaptive solvers step in the shifted time.
        epsilon: the model is evaluated for t in [epsilon, 1 − epsilon]; None takes `default_epsilon`.
        rtol, atol: error allowed to the adaptive solvers in a step, relative and absolute (default 1e-5 each).
        diffusion, diffusion_norm: form and factor of D(t) (`Path.diffusion`; default sigma, 1). A step takes at most
            the D that adds as much noise as x holds at the step's end: more would overshoot, and the law of the
            samples does not depend on D.
        last_step: of an SDE, None or one of `sde.LAST_STEPS`, without noise, from t = 1 − last_step_size (default
            0.04) to the data.
        generator: of the SDE's noise, one for all or one for each sample; an ODE draws nothing.
        start: `noise` is not noise, but x at this time; all steps are made from there on.
        constrain: called as constrain(x, t) after each step with the time that it came to, and gives the x to go on
            with; of the solvers with fixed steps.
        callback: called after each step with (steps done, steps in all, x); in all is None where the solver is
            adaptive. An exception from it ends the sampling.

    Raises:
        ValueError: for an unknown name, a number out of range, an option that the solver does not have, or epsilon 0
            where the velocity is infinite at an end.
        RuntimeError: where an adaptive solver meets a velocity that is not finite or cannot keep its tolerances.
    """
    check_choice("solver", solver, SOLVERS)
    _refuse_foreign(solver, SDE_SOLVERS, diffusion=diffusion, diffusion_norm=diffusion_norm)
    _refuse_foreign(solver, SDE_SOLVERS, last_step=last_step, last_step_size=last_step_size)
    if solver in SDE_SOLVERS:
        _refuse_foreign(solver, ADAPTIVE_SOLVERS, rtol=rtol, atol=atol)
        noises = Noises(generator, noise.shape[0])
        sde = SDE(diffusion, diffusion_norm, last_step, last_step_size)
        field = Field.build(
            model, noise, objective, epsilon, time_shift, sde=True, last_step_size=sde.last_step_size, start=start
        )
        x = working_precision(noise)
        return sde.integrate(field, x, solver, _count(steps), noises, callback, constrain).to(noise.dtype)
    _refuse_foreign(solver, FIXED_STEP_SOLVERS + SDE_SOLVERS, constrain=constrain)
    field = Field.build(model, noise, objective, epsilon, time_shift, start=start)
    x = _integrate(field, field.velocity, working_precision(noise), solver, steps, rtol, atol, callback, constrain)
    return x.to(noise.dtype)


@torch.no_grad()
def invert(
    model: Model,
    data: Float[Tensor, "n ..."],
    objective: Objective,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    time_shift: float = 1.0,
    epsilon: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "n ..."]:
    """The noise from which `sample` with the same ODE solver and options gives `data`: the ODE run backwards.

    Exact up to the solver's error. Arguments as for `sample`.

    Raises:
        ValueError: as `sample`, and for an SDE solver, whose runs cannot be turned round.
    """
    check_choice("ODE solver", solver, ODE_SOLVERS)
    field = Field.build(model, data, objective, epsilon, time_shift)
    backwards = field.reversed()
    return _integrate(backwards, field.velocity, working_precision(data), solver, steps, rtol, atol, callback).to(
        data.dtype
    )


@torch.no_grad()
def log_likelihood(
    model: Model,
    data: Float[Tensor, "n ..."],
    objective: Objective,
    *,
    trace: str = "hutchinson",
    probes: int | None = None,
    solver: str = "dopri5",
    steps: int | None = None,
    time_shift: float = 1.0,
    epsilon: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    generator: Generators = None,
) -> Float[Tensor, "n"]:
    """Log density (nats) of `data` under the ODE's samples: log N(noise; 0, I) − ∫ div v dt (arXiv 1810.01367, eq. 4).

    Args:
        trace: of the divergence: `exact` takes a backward pass for each element of a sample; `hutchinson` one for
            each of `probes` (default 1) random sign vectors, unbiased, the same vectors along the whole trajectory.
        generator: of the sign vectors, one for all or one for each sample.

    The other arguments are those of `sample`. The model is differentiated in x, so it must not treat x as constant.

    Raises:
        ValueError: as `invert`, and for probes with an exact trace.
    """
    check_choice("ODE solver", solver, ODE_SOLVERS)
    if check_choice("trace", trace, TRACES) == "exact" and probes is not None:
        raise ValueError("probes is for the hutchinson trace; an exact trace takes none")
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, not {probes}")
    field = Field.build(model, data, objective, epsilon, time_shift)
    x, count = working_precision(data), data[0].numel()
    if trace == "exact":
        units = torch.eye(count, dtype=x.dtype, device=x.device)
        signs = [unit.reshape(1, *x.shape[1:]).expand_as(x) for unit in units]
    else:
        noises = Noises(generator, len(data))
        signs = [(noises.like(x) >= 0).to(x.dtype) * 2 - 1 for _ in range(probes or 1)]

    def velocity_and_divergence(state: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            x = state[:, :count].reshape(data.shape).detach().requires_grad_()
            v = field.velocity(x, t)
            parts = [
                (torch.autograd.grad((v * sign).sum(), x, retain_graph=True)[0] * sign).flatten(1).sum(1)
                for sign in signs
            ]
        divergence = torch.stack(parts).sum(0) if trace == "exact" else torch.stack(parts).mean(0)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    end = _integrate(field.reversed(), velocity_and_divergence, start, solver, steps, rtol, atol, None)
    noise, change = end[:, :count], end[:, count]
    # `change` is the integral from data to noise, minus that of the formula.
    return -0.5 * (noise**2).sum(1) - 0.5 * count * math.log(2 * math.pi) + change


def _refuse_foreign(solver: str, owners: Sequence[str], **options: object) -> None:
    for name, value in options.items():
        if value is not None and solver not in owners:
            raise ValueError(f"{name} is for {' and '.join(owners)}; solver {solver} has no use for it")


def _count(steps: int | None) -> int:
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return steps


def _integrate(
    field: Field,
    slope: Slope,
    x: Tensor,
    solver: str,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
    callback: Callback | None,
    constrain: Constraint | None = None,
) -> Tensor:
    """x at the other end of the field's time, dx/dt = slope(x, t)."""
    _refuse_foreign(solver, FIXED_STEP_SOLVERS + SDE_SOLVERS, steps=steps)
    _refuse_foreign(solver, ADAPTIVE_SOLVERS, rtol=rtol, atol=atol)
    if solver in ADAPTIVE_SOLVERS:
        rtol, atol = (1e-5 if value is None else value for value in (rtol, atol))
        return _adaptive(field, slope, x, solver, rtol, atol, callback)
    steps = _count(steps)
    for i, (t, after) in enumerate(pairwise(field.grid(steps))):
        x = _STEPS[solver](slope, x, t, after - t)
        if constrain is not None:
            x = constrain(x, after)
        if callback is not None:
            callback(i + 1, steps, x)
    return x


def _euler(slope: Slope, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * slope(x, t)


def _midpoint(slope: Slope, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * slope(x + 0.5 * h * slope(x, t), t + 0.5 * h)


def _heun(slope: Slope, x: Tensor, t: float, h: float) -> Tensor:
    first = slope(x, t)
    return x + 0.5 * h * (first + slope(x + h * first, t + h))


def _rk4(slope: Slope, x: Tensor, t: float, h: float) -> Tensor:
    first = slope(x, t)
    second = slope(x + 0.5 * h * first, t + 0.5 * h)
    third = slope(x + 0.5 * h * second, t + 0.5 * h)
    return x + h / 6 * (first + 2 * second + 2 * third + slope(x + h * third, t + h))


_STEPS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}


def _adaptive(
    field: Field, slope: Slope, x: Tensor, solver: str, rtol: float, atol: float, callback: Callback | None
) -> Tensor:
    from torchdiffeq import odeint

    floor = 4 * torch.finfo(x.dtype).eps
    if not (rtol >= floor and atol >= 0):
        raise ValueError(f"rtol must be at least {floor:.1g} in {x.dtype} and atol at least 0, not {rtol} and {atol}")
    done = 0

    def accepted(s: Tensor, before: Tensor, h: Tensor) -> None:
        # torchdiffeq reports a step with the state before it: the state after step k comes with step k + 1.
        nonlocal done
        if done and callback is not None:
            callback(done, None, before)
        done += 1

    def derivative(s: Tensor, x: Tensor) -> Tensor:
        t, dt_ds = field.time(min(max(s.item(), 0.0), 1.0))
        value = slope(x, t) * dt_ds
        if not value.isfinite().all():
            raise RuntimeError(f"the model's velocity at t = {t:.6g} is not finite, so {solver} cannot go on")
        return value

    derivative.callback_accept_step = accepted
    s = torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
    # step_t makes the last step end at s = 1: by itself torchdiffeq steps over it, where there is no model, and
    # interpolates back.
    options = {"step_t": s[1:], "max_num_steps": MOST_STEPS}
    try:
        x = odeint(derivative, x, s, rtol=rtol, atol=atol, method=solver, options=options)[-1]
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "max_num_steps exceeded")):
            raise
        raise RuntimeError(f"{solver} finds no steps long enough with rtol {rtol}, atol {atol}; raise them") from error
    if callback is not None:
        callback(done, None, x)
    return x
