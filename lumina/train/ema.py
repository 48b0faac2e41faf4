"""Exponential moving average of the weights, kept where the fp32 masters live."""

from collections.abc import Callable

import torch
from torch import Tensor

from lumina.parallel.fragments import Fragment


class EMA:
    """fp32, sharded as the optimizer is: no communication, and no copy of what another rank owns."""

    def __init__(self, fragments: list[Fragment], decay: float):
        self.decay = decay
        self.fragments = fragments
        self.values: list[Tensor] = [fragment.master.clone() for fragment in fragments]

    def decay_at(self, step: int) -> float:
        """Less than `decay` at first, so that the initial weights are forgotten: (1 + step)/(10 + step)."""
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, step: int) -> None:
        """Move towards the weights as they are after `step` steps."""
        if self.values:
            torch._foreach_lerp_(self.values, [f.master for f in self.fragments], 1 - self.decay_at(step))

    def restore(self, read: Callable[[Fragment], Tensor | None]) -> None:
        """Take the flat values that `read` gives for each fragment; the weights, where it gives none."""
        for fragment, value in zip(self.fragments, self.values, strict=True):
            found = read(fragment)
            value.copy_(fragment.master if found is None else found)
