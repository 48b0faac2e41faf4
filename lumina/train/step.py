"""One training step of flow matching (arXiv 2405.05945, section 2.1; SiT, arXiv 2401.08740)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lumina.flow.loss import Objective
from lumina.parallel.engine import Engine, StepOutcome
from lumina.train.ema import EMA
from lumina.train.prepare import TrainingPack


@dataclass(frozen=True)
class StepResult:
    """This rank's share of the global loss (a sum over ranks gives it), and what the optimizer did."""

    loss_share: float
    outcome: StepOutcome


def train_step(
    engine: Engine,
    ema: EMA,
    objective: Objective,
    packs: Sequence[TrainingPack],
    *,
    global_samples: int,
    learning_rate: float,
    step: int,
    before_update: Callable[[], object] = lambda: None,
) -> StepResult:
    """Loss, gradients and update from this rank's packs of one global batch.

    The loss is the mean over the global batch of each sample's mean, so a sample counts the same whatever its size
    and whichever ranks, pack or forward pass it is in.
    """

    def noised(pack: TrainingPack) -> Float[Tensor, "t p"]:
        return objective.corrupt(pack.data, pack.noise, pack.t_of_token)

    def loss(pack: TrainingPack, output: Float[Tensor, "t p"]) -> Float[Tensor, ""]:
        errors = objective.squared_error(output, pack.data, pack.noise, pack.t_of_token)
        return pack.per_sample(errors).sum() / global_samples

    loss_share = engine.accumulate(packs, noised, loss)
    before_update()
    outcome = engine.step(learning_rate)
    if not outcome.skipped:
        ema.update(step)
    return StepResult(loss_share, outcome)
