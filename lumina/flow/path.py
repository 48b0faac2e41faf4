"""Probability paths between noise (t = 0) and data (t = 1), and what a network may predict on them.

x_t = alpha(t)·data + sigma(t)·noise. Source: SiT (arXiv 2401.08740), sections 2 and 3 and appendix; the VP path is that
of score-based diffusion (arXiv 2011.13456) with its time turned round.

Every conversion below follows from two coefficients of the velocity, written v = k·x + g·score:
k = alpha'/alpha and g = k·sigma² − sigma·sigma' (`drift_rate`, `drift_variance`). Each path gives them in closed form,
since the difference in g cancels catastrophically near the ends when it is computed from its parts.

Coefficients are float32 or better whatever the data: bfloat16 data come back as float32.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "score")
DIFFUSIONS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")


def check_choice(what: str, name: str, options: Sequence[str]) -> str:
    """`name` if it is one of `options`.

    Raises:
        ValueError: naming the nearest option, or all of them where none is near.
    """
    if name in options:
        return name
    close = difflib.get_close_matches(str(name).lower(), [option.lower() for option in options], n=1)
    nearest = next((option for option in options if close and option.lower() == close[0]), None)
    hint = f"did you mean {nearest}?" if nearest else f"it is one of {', '.join(options)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def _over(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient (N,) shaped to multiply x (N, ...)."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def _precise(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


class Path(ABC):
    """One choice of alpha and sigma. Times are (N,) in [0, 1]; x, data and noise (N, ...), a time each.

    In training N counts the tokens of a packed sequence, in sampling the samples of a batch.
    """

    @abstractmethod
    def alpha(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Share of data."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Share of noise."""

    @abstractmethod
    def alpha_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Derivative of alpha in t."""

    @abstractmethod
    def sigma_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Derivative of sigma in t; on the VP path it is infinite at t = 1."""

    @abstractmethod
    def drift_rate(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """k = alpha'/alpha; infinite at t = 0 where alpha is 0 there (linear, GVP)."""

    @abstractmethod
    def drift_variance(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """g = k·sigma² − sigma·sigma' (the paper's w/2 of the SBDM diffusion); infinite where k is."""

    @abstractmethod
    def drift_deviation(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """g/sigma, what an error of the noise is multiplied by in the velocity; infinite at t = 0 (VP: t = 1)."""

    def interpolate(
        self, data: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """x_t = alpha·data + sigma·noise."""
        t = _precise(t)
        return _over(self.alpha(t), data) * data + _over(self.sigma(t), noise) * noise

    def velocity(
        self, data: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """dx_t/dt = alpha'·data + sigma'·noise."""
        t = _precise(t)
        return _over(self.alpha_dot(t), data) * data + _over(self.sigma_dot(t), noise) * noise

    def target(
        self, prediction: str, data: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """What a network of that kind of prediction should give for this pair; the score is −noise/sigma.

        Raises:
            ValueError: for an unknown kind.
        """
        match check_choice("prediction", prediction, PREDICTIONS):
            case "velocity":
                return self.velocity(data, noise, t)
            case "noise":
                return noise
            case _:
                return -noise / _over(self.sigma(_precise(t)), noise)

    def to_velocity(
        self, prediction: str, output: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """The velocity at x that a network's output of that kind of prediction means.

        Raises:
            ValueError: for an unknown kind.
        """
        t = _precise(t)
        match check_choice("prediction", prediction, PREDICTIONS):
            case "velocity":
                return output
            case "noise":
                return _over(self.drift_rate(t), x) * x - _over(self.drift_deviation(t), x) * output
            case _:
                return _over(self.drift_rate(t), x) * x + _over(self.drift_variance(t), x) * output

    def to_score(
        self, prediction: str, output: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """The score (gradient of the log density in x) that a network's output of that kind of prediction means.

        Raises:
            ValueError: for an unknown kind.
        """
        match check_choice("prediction", prediction, PREDICTIONS):
            case "velocity":
                return self.score_from_velocity(output, x, t)
            case "noise":
                return -output / _over(self.sigma(_precise(t)), x)
            case _:
                return output

    def noise_from_velocity(
        self, velocity: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """The noise at x, finite at both ends."""
        t = _precise(t)
        alpha, sigma, alpha_dot, sigma_dot = self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t)
        # Solved from x = alpha·d + sigma·n and v = alpha'·d + sigma'·n; the determinant is 1 (linear) or pi/2 (GVP).
        determinant = alpha_dot * sigma - alpha * sigma_dot
        return (_over(alpha_dot, x) * x - _over(alpha, x) * velocity) / _over(determinant, x)

    def score_from_velocity(
        self, velocity: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """((alpha/alpha')·v − x) / (sigma² − (alpha/alpha')·sigma'·sigma), infinite where sigma is 0 (except on VP)."""
        return -self.noise_from_velocity(velocity, x, t) / _over(self.sigma(_precise(t)), x)

    def diffusion(self, form: str, t: Float[Tensor, "n"], norm: float = 1.0) -> Float[Tensor, "n"]:
        """D(t) of the sampling SDE dx = (v + D·score)dt + sqrt(2D)dW (SiT, eq. 7 and appendix); `norm` multiplies it.

        Raises:
            ValueError: for an unknown form.
        """
        t = _precise(t)
        match check_choice("diffusion", form, DIFFUSIONS):
            case "constant":
                value = torch.ones_like(t)
            case "SBDM":
                value = self.drift_variance(t)
            case "sigma":
                value = self.sigma(t)
            case "linear":
                value = 1 - t
            case "decreasing":
                value = 0.25 * (torch.cos(math.pi * t) + 1) ** 2
            case _:
                value = torch.sin(math.pi * t) ** 2
        return norm * value


@dataclass(frozen=True)
class Linear(Path):
    """alpha = t, sigma = 1 − t: straight lines, velocity data − noise (rectified flow)."""

    def alpha(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return t

    def sigma(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 1 - t

    def alpha_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.ones_like(t)

    def sigma_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return -torch.ones_like(t)

    def drift_rate(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 1 / t

    def drift_variance(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return (1 - t) / t

    def drift_deviation(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 1 / t


@dataclass(frozen=True)
class GVP(Path):
    """alpha = sin(pi·t/2), sigma = cos(pi·t/2): the generalised variance-preserving path."""

    def alpha(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        # The cosine as a sine of 1 − t: exactly 0 at t = 1, and accurate beside it.
        return torch.sin(0.5 * math.pi * (1 - t))

    def alpha_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 0.5 * math.pi * self.sigma(t)

    def sigma_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return -0.5 * math.pi * self.alpha(t)

    def drift_rate(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 0.5 * math.pi * self.sigma(t) / self.alpha(t)

    def drift_variance(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.drift_rate(t)

    def drift_deviation(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 0.5 * math.pi / self.alpha(t)


@dataclass(frozen=True)
class VP(Path):
    """log alpha = −(1−t)²(b1−b0)/4 − (1−t)·b0/2, sigma² = 1 − alpha²: the variance-preserving diffusion.

    A little data is left at t = 0 (alpha 0.0066); at t = 1 sigma is 0 and falls with infinite slope.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -0.25 * s * s * (self.beta_max - self.beta_min) - 0.5 * s * self.beta_min

    def alpha(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        # expm1: 1 − alpha² has no digits left near t = 1.
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def alpha_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.drift_rate(t) * self.alpha(t)

    def sigma_dot(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return -self.drift_rate(t) * self.alpha(t) ** 2 / self.sigma(t)

    def drift_rate(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 0.5 * (self.beta_min + (1 - t) * (self.beta_max - self.beta_min))

    def drift_variance(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.drift_rate(t)  # sigma² + alpha² = 1

    def drift_deviation(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.drift_rate(t) / self.sigma(t)

    def noise_from_velocity(
        self, velocity: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """The noise at x, finite at both ends."""
        return -_over(self.sigma(_precise(t)), x) * self.score_from_velocity(velocity, x, t)

    def score_from_velocity(
        self, velocity: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """v/k − x, finite at both ends: the determinant of the general form is infinite where sigma is 0."""
        return velocity / _over(self.drift_rate(_precise(t)), x) - x


def get_path(name: str) -> Path:
    """The path of that name: linear, gvp or vp.

    Raises:
        ValueError: for another name, naming the nearest.
    """
    return {"linear": Linear, "gvp": GVP, "vp": VP}[check_choice("path", name, PATHS)]()
