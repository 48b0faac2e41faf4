"""What is learned: path, prediction, loss weight and law of time in one object, and the mean over samples.

Sources: SiT (arXiv 2401.08740), section 3, for the weights; FLAG_DIT's mean over each sample, then over samples.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lumina.flow.path import PREDICTIONS, VP, Path, check_choice, get_path
from lumina.flow.time import TimeLaw, check_epsilon, default_epsilon

WEIGHTINGS = ("none", "velocity", "likelihood")


@dataclass(frozen=True)
class Objective:
    """A training objective, and how its network's outputs are read in sampling.

    Raises:
        ValueError: for an unknown name, a weight on a velocity prediction, or epsilon 0 where the loss is infinite
            at an end of time.
    """

    path: Path
    prediction: str
    weighting: str
    time_law: TimeLaw

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        if self.prediction == "velocity" and self.weighting != "none":
            raise ValueError(
                f"weighting {self.weighting} is for noise and score predictions; a velocity prediction takes none"
            )
        if self.time_law.epsilon == 0 and (
            self.weighting != "none" or (isinstance(self.path, VP) and self.prediction == "velocity")
        ):
            what = f"weighting {self.weighting}" if self.weighting != "none" else "a velocity prediction"
            raise ValueError(
                f"epsilon must be above 0 with {what} on the {type(self.path).__name__} path, whose loss is infinite "
                "at an end of time; leave it out for the default"
            )

    @classmethod
    def build(
        cls,
        path: str = "linear",
        prediction: str = "velocity",
        weighting: str = "none",
        time_law: str = "uniform",
        time_shift: float = 1.0,
        epsilon: float | None = None,
    ) -> "Objective":
        """From the names of the configuration's `flow` section; epsilon None takes the default of `default_epsilon`.

        Raises:
            ValueError: as the class, and for a shift or an epsilon out of range.
        """
        chosen = get_path(path)
        if epsilon is None:
            epsilon = default_epsilon(chosen, prediction, "training")
        law = TimeLaw(time_law, float(time_shift), float(check_epsilon(epsilon)))
        return cls(chosen, prediction, weighting, law)

    def draw_times(self, u: Float[Tensor, "n"]) -> Float32[Tensor, "n"]:
        """Times of uniform draws in (0, 1)."""
        return self.time_law.from_uniform(u)

    def corrupt(
        self, data: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """x_t, the network's input."""
        return self.path.interpolate(data, noise, t)

    def weight(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The factor on the squared error at t.

        `velocity`, (g/sigma)², makes the loss of a noise or score that of the velocity it means; `likelihood`,
        g/sigma², bounds the log likelihood (g: `Path.drift_variance`; SiT, section 3).
        """
        match self.weighting:
            case "none":
                return torch.ones_like(t)
            case "velocity":
                return self.path.drift_deviation(t) ** 2
            case _:
                return self.path.drift_deviation(t) / self.path.sigma(t)

    def squared_error(
        self,
        output: Float[Tensor, "n ..."],
        data: Float[Tensor, "n ..."],
        noise: Float[Tensor, "n ..."],
        t: Float[Tensor, "n"],
    ) -> Float32[Tensor, "n ..."]:
        """The weighted squared error of each element, in float32.

        A score's error is multiplied by sigma, (sigma·output + noise)², as the score itself is infinite at t = 1.
        """
        output, data, noise, t = output.float(), data.float(), noise.float(), t.float()
        trailing = [1] * (data.ndim - 1)
        match self.prediction:
            case "velocity":
                return (output - self.path.velocity(data, noise, t)) ** 2
            case "noise":
                error = output - noise
            case _:
                error = self.path.sigma(t).reshape(-1, *trailing) * output + noise
        if self.weighting == "none":
            return error**2
        return self.weight(t).reshape(-1, *trailing) * error**2

    def velocity(
        self, output: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."], t: Float[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """The velocity at x that the network's output means."""
        return self.path.to_velocity(self.prediction, output, x, t)


def per_sample_mean(
    error_td: Float[Tensor, "t d"],
    valid_t: Bool[Tensor, "t"],
    lengths: Int64[Tensor, "n"],
    count_n: Int64[Tensor, "n"] | None = None,
    width_n: Int64[Tensor, "n"] | None = None,
) -> Float[Tensor, "n"]:
    """The mean of each packed sample over its valid tokens; 0 for a sample that has none.

    `lengths`, on the error's device, counts each sample's tokens, valid or not, in the order of the sequence and sums
    to T. Learned tokens (nextline, nextframe) are not valid: nothing is predicted there. The result is deterministic on
    CUDA.

    `count_n` is how many valid tokens a sample has where some are elsewhere; the result is then this sequence's share
    of the mean, and the shares of all sequences that hold a part of the sample sum to it.

    `width_n` is how many of the D values of its tokens a sample has, the first ones, where the rest is padding: the
    mean is over those alone, and the rest has no gradient.

    Raises:
        ValueError: where lengths do not sum to T (looked at on the CPU only, so that CUDA is not waited for).
    """
    if lengths.device.type == "cpu" and int(lengths.sum()) != error_td.shape[0]:
        raise ValueError(f"lengths sum to {int(lengths.sum())}, not to the {error_td.shape[0]} tokens of the sequence")
    # segment_reduce rather than index_add: no float atomics, whose order of summation changes from run to run.
    if width_n is None:
        kept_t = error_td.where(valid_t[:, None], 0.0).mean(dim=1)
    else:
        width_t = width_n.repeat_interleave(lengths, output_size=len(error_td))
        real_td = torch.arange(error_td.shape[1], device=error_td.device) < width_t[:, None]
        kept_t = error_td.where(real_td & valid_t[:, None], 0.0).sum(dim=1) / width_t
    total_n = torch.segment_reduce(kept_t, "sum", lengths=lengths, axis=0, unsafe=True)
    if count_n is None:
        valid = valid_t.to(error_td.dtype)
        count_n = torch.segment_reduce(valid, "sum", lengths=lengths, axis=0, unsafe=True)
    return total_n / count_n.clamp(min=1)
