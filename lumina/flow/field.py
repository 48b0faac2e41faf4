"""The network as a vector field over a shifted time, as the solvers see it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.flow.loss import Objective
from lumina.flow.path import VP
from lumina.flow.time import check_epsilon, check_shift, default_epsilon, interval

Model = Callable[[Tensor, Tensor], Tensor]


def working_precision(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in the dtype that a solver adds up in: float32, or x's own where that is finer."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class Field:
    """dx/dt and the score at (x, t), and the map of solver time s in [0, 1] onto t in [start, end] (or back)."""

    model: Model
    objective: Objective
    dtype: torch.dtype  # what the model is given
    start: float
    end: float
    shift: float
    bounds: tuple[float, float]
    backwards: bool = False

    @classmethod
    def build(
        cls,
        model: Model,
        like: Float[Tensor, "n ..."],
        objective: Objective,
        epsilon: float | None,
        time_shift: float,
        *,
        sde: bool = False,
        last_step_size: float | None = None,
        start: float | None = None,
    ) -> "Field":
        """For x of the shape and dtype of `like`; with a last step the field ends where that begins.

        It begins at t = `start`, where that is given and lies above epsilon.

        Raises:
            ValueError: for a shift, epsilon, start or last step out of range, or epsilon 0 where something is infinite.
        """
        path, prediction = objective.path, objective.prediction
        if epsilon is None:
            epsilon = default_epsilon(path, prediction, "sampling", sde=sde)
        check_epsilon(epsilon)
        if epsilon == 0:
            at_noise = prediction != "velocity" and not isinstance(path, VP)
            at_data = last_step_size is None and (sde or (prediction == "noise" and isinstance(path, VP)))
            if at_noise or at_data:
                raise ValueError(
                    f"epsilon must be above 0: the {'SDE' if sde else 'ODE'} of a {prediction} prediction on the "
                    f"{type(path).__name__} path is infinite at t = {0 if at_noise else 1}; the default is 0.001"
                )
        bounds = interval(epsilon, working_precision(like).dtype)
        end = bounds[1]
        if last_step_size is not None:
            if last_step_size < epsilon:
                raise ValueError(
                    f"last_step_size must be at least epsilon ({epsilon}), not {last_step_size}: "
                    "the last step starts at 1 - last_step_size"
                )
            end = 1 - last_step_size
        if start is not None and not 0 <= start < end:
            raise ValueError(f"start must be a time from 0 (noise) to below {end:g}, where sampling ends, not {start}")
        begin = bounds[0] if start is None else max(bounds[0], start)
        return cls(model, objective, like.dtype, begin, end, check_shift(time_shift), bounds)

    def reversed(self) -> "Field":
        """The same field with s running from data to noise."""
        return dataclasses.replace(self, backwards=not self.backwards)

    def time(self, s: float) -> tuple[float, float]:
        """t at s, and dt/ds."""
        if self.backwards:
            s = 1 - s
        denominator = s + self.shift * (1 - s)
        span = self.end - self.start
        slope = span * self.shift / denominator**2
        return self.start + span * s / denominator, -slope if self.backwards else slope

    def grid(self, steps: int) -> list[float]:
        """The steps + 1 times of equal steps in s."""
        return [self.time(i / steps)[0] for i in range(steps + 1)]

    def at(self, x: Float[Tensor, "n ..."], t: float) -> Float[Tensor, "n"]:
        """t for each sample of x."""
        # Rounding must not carry t over the bounds: the model never trained there, and coefficients are infinite.
        low, high = self.bounds
        return torch.full((len(x),), min(max(t, low), high), dtype=x.dtype, device=x.device)

    def velocity(self, x: Float[Tensor, "n ..."], t: float) -> Float[Tensor, "n ..."]:
        """One evaluation of the model, as a velocity."""
        t_n = self.at(x, t)
        return self.objective.velocity(self._output(x, t_n), x, t_n)

    def velocity_and_score(
        self, x: Float[Tensor, "n ..."], t: float
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
        """One evaluation of the model, as a velocity and as a score."""
        t_n = self.at(x, t)
        output = self._output(x, t_n)
        path, prediction = self.objective.path, self.objective.prediction
        return path.to_velocity(prediction, output, x, t_n), path.to_score(prediction, output, x, t_n)

    def _output(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.model(x.to(self.dtype), t)
        if output.shape != x.shape:
            raise ValueError(f"the model returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}")
        return output.to(x.dtype)
