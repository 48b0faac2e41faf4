"""One training step of flow matching (arXiv 2405.05945, section 2.1; SiT, arXiv 2401.08740)."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lumina.flow.loss import Objective, per_sample_mean
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
) -> StepResult:
    """Loss, gradients and update from this rank's packs of one global batch.

    The loss is the mean over the global batch of each sample's mean, so a sample counts the same whatever its size
    and whichever rank, pack or forward pass it is in.
    """
    loss_share = 0.0
    for pack in packs:
        loss = pack_losses(engine, objective, pack).sum() / global_samples
        engine.backward(loss)
        loss_share += float(loss.detach())
    outcome = engine.step(learning_rate)
    if not outcome.skipped:
        ema.update(step)
    return StepResult(loss_share, outcome)


def pack_losses(engine: Engine, objective: Objective, pack: TrainingPack) -> Float[Tensor, "n"]:
    """The loss of each sample of a pack: the prediction at x_t against what the path says it should be."""
    t = pack.t_of_token
    x_t = objective.corrupt(pack.data, pack.noise, t)
    output = engine(x_t, pack.t, labels=pack.labels, layout=pack.layout, captions=pack.captions)
    errors = objective.squared_error(output, pack.data, pack.noise, t)
    return per_sample_mean(errors, pack.layout.is_patch_t, pack.lengths)
