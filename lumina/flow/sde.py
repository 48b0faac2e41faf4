"""The sampling SDE dx = (v + D·score)dt + sqrt(2D)dW, its two solvers and its last steps.

Source: SiT (arXiv 2401.08740), sections 2 and 4 and appendix. D(t) >= 0 is free: the law of x_t is the same for any.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.flow.field import Field
from lumina.flow.path import DIFFUSIONS, check_choice

LAST_STEPS = ("mean", "tweedie", "euler")

Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, int | None, Tensor], object]
Constraint = Callable[[Tensor, float], Tensor]


class Noises:
    """Standard normal draws from one generator, or each sample's from its own so that it does not depend on others.

    Raises:
        ValueError: for a list that is not one generator a sample.
    """

    def __init__(self, generators: Generators, samples: int):
        self.generators = generators
        if isinstance(generators, Sequence) and len(generators) != samples:
            raise ValueError(f"{len(generators)} generators were given for {samples} samples; give one, or one each")

    def like(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The next draws, of the shape, dtype and device of x."""
        if isinstance(self.generators, Sequence):
            return torch.stack([_draw(x[i], generator) for i, generator in enumerate(self.generators)])
        return _draw(x, self.generators)


def _draw(x: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator lives: a CPU generator gives the same samples on any device.
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


@dataclass(frozen=True)
class SDE:
    """The choices that an ODE does not have; None takes the default (diffusion sigma, norm 1, size 0.04).

    Raises:
        ValueError: for an unknown name, a number out of range, or the size of a last step without one.
    """

    diffusion: str | None = None
    norm: float | None = None
    last_step: str | None = None
    size: float | None = None

    def __post_init__(self) -> None:
        if self.diffusion is not None:
            check_choice("diffusion", self.diffusion, DIFFUSIONS)
        if self.norm is not None and not (math.isfinite(self.norm) and self.norm > 0):
            raise ValueError(
                f"diffusion_norm must be a positive number, not {self.norm}; without noise, use an ODE solver"
            )
        if self.last_step is not None:
            check_choice("last_step", self.last_step, LAST_STEPS)
        elif self.size is not None:
            raise ValueError(f"last_step_size needs a last_step, one of {', '.join(LAST_STEPS)}")
        if self.size is not None and not 0 < self.size < 0.5:
            raise ValueError(f"last_step_size must lie between 0 and 0.5, not {self.size}")

    @property
    def last_step_size(self) -> float | None:
        """In t; None without a last step."""
        if self.last_step is None:
            return None
        return 0.04 if self.size is None else self.size

    def coefficient(
        self, field: Field, x: Float[Tensor, "n ..."], t: float, until: float, h: float
    ) -> Float[Tensor, "n ..."]:
        """D at t, shaped to multiply x, for a step of h that ends where x holds sigma(until) of noise.

        D·h is held to sigma²/2, so that the noise put in, of variance 2D·h, is no more than x has at the step's end.
        More would overshoot: the score pulls by up to 1/sigma², and D·h/sigma² above 2 makes an explicit step grow
        (SBDM at the noise end, where it is infinite; constant at the data end).
        """
        path = field.objective.path
        form = path.diffusion(self.diffusion or "sigma", field.at(x, t), 1.0 if self.norm is None else self.norm)
        held = 0.5 * path.sigma(field.at(x, until)) ** 2 / h
        return torch.minimum(form, held).reshape(-1, *[1] * (x.ndim - 1))

    def integrate(
        self,
        field: Field,
        x: Float[Tensor, "n ..."],
        solver: str,
        steps: int,
        noises: Noises,
        callback: Callback | None,
        constrain: Constraint | None = None,
    ) -> Float[Tensor, "n ..."]:
        """x at the field's end, or at t = 1 after the last step, which is one of `steps`.

        Raises:
            ValueError: where there is no step besides the last.
        """
        moves = steps - (self.last_step is not None)
        if moves < 1:
            raise ValueError("steps must be at least 2 with a last step, which is one of them")
        step = {"sde_euler": self._euler_maruyama, "sde_heun": self._heun}[solver]
        for i, (t, after) in enumerate(pairwise(field.grid(moves))):
            x = step(field, x, t, after, noises.like(x) * math.sqrt(after - t))
            if constrain is not None:
                x = constrain(x, after)
            if callback is not None:
                callback(i + 1, steps, x)
        if self.last_step is not None:
            x = self._finish(field, x)
            if constrain is not None:
                x = constrain(x, 1.0)
            if callback is not None:
                callback(steps, steps, x)
        return x

    def _drift(self, field: Field, x: Tensor, t: float, d: Tensor) -> Tensor:
        velocity, score = field.velocity_and_score(x, t)
        return velocity + d * score

    def _euler_maruyama(self, field: Field, x: Tensor, t: float, after: float, kick: Tensor) -> Tensor:
        d = self.coefficient(field, x, t, after, after - t)
        return x + (after - t) * self._drift(field, x, t, d) + (2 * d).sqrt() * kick

    def _heun(self, field: Field, x: Tensor, t: float, after: float, kick: Tensor) -> Tensor:
        # Both slopes see the same noise; as that does not depend on x the scheme is of weak order 2 (Kloeden and
        # Platen, 15.1). D is taken at the middle for both.
        h = after - t
        d = self.coefficient(field, x, t + 0.5 * h, after, h)
        kick = (2 * d).sqrt() * kick
        first = self._drift(field, x, t, d)
        second = self._drift(field, x + h * first + kick, after, d)
        return x + 0.5 * h * (first + second) + kick

    def _finish(self, field: Field, x: Tensor) -> Tensor:
        t, h = field.end, self.last_step_size
        velocity, score = field.velocity_and_score(x, t)
        match self.last_step:
            case "mean":
                return x + h * (velocity + self.coefficient(field, x, t, t, h) * score)
            case "euler":
                return x + h * velocity
            case _:
                path, t_n = field.objective.path, field.at(x, t)
                alpha, sigma = (f(t_n).reshape(-1, *[1] * (x.ndim - 1)) for f in (path.alpha, path.sigma))
                return x / alpha + sigma**2 / alpha * score
