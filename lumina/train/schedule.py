"""Learning rate as a function of the step, with no state to save."""

import math

from lumina.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of step `step` (from 1): linear warm-up, then constant, cosine or linear to the final rate."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    left = 1 - done if train.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * left
