"""Times: how they are drawn in training, shifted, and kept off the ends where something diverges.

t = 0 is noise and t = 1 is data. Sources: SiT (arXiv 2401.08740) for the intervals, arXiv 2403.03206 for the
logit-normal law and the shift by resolution.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.flow.path import PREDICTIONS, VP, Path, check_choice

TIME_LAWS = ("uniform", "logit_normal")
STAGES = ("training", "sampling")


def check_shift(m: float) -> float:
    """`m` if it can be a time shift.

    Raises:
        ValueError: where it is not a positive number.
    """
    if not (math.isfinite(m) and m > 0):
        raise ValueError(f"time_shift must be a positive number, not {m}; 1 is no shift")
    return m


def check_epsilon(epsilon: float) -> float:
    """`epsilon` if [epsilon, 1 − epsilon] is an interval inside [0, 1].

    Raises:
        ValueError: where it is not.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must lie in [0, 0.5), not {epsilon}; times keep that distance from 0 and from 1")
    return epsilon


def shift_time(t: Float[Tensor, "*n"], m: float) -> Float[Tensor, "*n"]:
    """t ↦ t/(t + m − m·t): onto [0, 1], increasing; m > 1 moves times towards noise (t = 0), m < 1 towards data.

    Raises:
        ValueError: for m that is not a positive number.
    """
    check_shift(m)
    # With m·(1 − t) in one piece 1 maps onto 1 exactly.
    return t / (t + m * (1 - t))


def default_epsilon(path: Path, prediction: str, stage: str, *, sde: bool = False) -> float:
    """The epsilon of [epsilon, 1 − epsilon] where the user gave none; `sde` says that sampling is by an SDE.

    0 where nothing diverges: a velocity prediction on the linear and GVP paths, trained or integrated as an ODE.
    Else something does at one end or both (docs/flow.md has the table) and both are kept clear, by 1e-3, on the VP
    path in training by 1e-5 (its velocity diverges like 1/sigma, slowly).

    Raises:
        ValueError: for an unknown prediction or stage.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("stage", stage, STAGES)
    if isinstance(path, VP):
        return 1e-5 if stage == "training" else 1e-3
    return 1e-3 if prediction != "velocity" or (sde and stage == "sampling") else 0.0


@lru_cache
def interval(epsilon: float, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and largest number of `dtype` in [epsilon, 1 − epsilon].

    Rounding to the nearest would put 1 − 1e-9 at 1 in float32, and 0.999 beyond 0.999.
    """
    exact = torch.tensor([epsilon, 1 - epsilon], dtype=torch.float64)
    low, high = exact.to(dtype)
    if low.double() < exact[0]:
        low = torch.nextafter(low, torch.ones_like(low))
    if high.double() > exact[1] or (epsilon > 0 and high == 1):
        high = torch.nextafter(high, torch.zeros_like(high))
    return low.item(), high.item()


@dataclass(frozen=True)
class TimeLaw:
    """The distribution of training times: a law on (0, 1), then the shift, then onto [epsilon, 1 − epsilon].

    Raises:
        ValueError: for an unknown law, a shift that is not positive, or epsilon outside [0, 0.5).
    """

    law: str = "uniform"
    shift: float = 1.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_choice("time_law", self.law, TIME_LAWS)
        check_shift(self.shift)
        check_epsilon(self.epsilon)

    def from_uniform(self, u: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Times (float32) of uniform draws u in (0, 1): increasing in u, so equal draws give equal times anywhere.

        Computed in float64: the logit-normal quantile of a float32 u near 1 has lost its digits.
        """
        t = u.double()
        if self.law == "logit_normal":
            t = torch.sigmoid(torch.special.ndtri(t))
        t = shift_time(t, self.shift)
        t = self.epsilon + (1 - 2 * self.epsilon) * t
        return t.float().clamp(*interval(self.epsilon, torch.float32))
