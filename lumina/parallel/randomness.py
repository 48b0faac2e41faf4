"""Randomness that no layout can change: each draw is a function of the seed and of the sample, nothing else.

No random state is carried from step to step, so none is saved: whichever rank holds a sample, in whichever order,
before or after a resume, draws the same numbers for it.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # or the shape checks of the tests cannot look at it
class Drawn(Protocol):
    """What identifies one showing of a sample: its id, the epoch, and which repeat within the epoch."""

    sample_id: int
    epoch: int
    occurrence: int


@dataclass(frozen=True)
class Randomness:
    """The draws of a run with this seed; `purpose` keeps them apart ("time", "noise", "caption dropout", …)."""

    seed: int

    def uniform(self, purpose: str, sample: Drawn) -> float:
        """One number in [0, 1)."""
        return float(self._generator(purpose, sample).random())

    def normal(self, purpose: str, sample: Drawn, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Standard normal numbers, fp32, on the CPU."""
        return torch.from_numpy(self._generator(purpose, sample).standard_normal(shape, dtype=np.float32))

    def _generator(self, purpose: str, sample: Drawn) -> np.random.Generator:
        # Philox (Salmon et al., 2011) is counter-based: its key may be anything, and a hash of what identifies the
        # draw gives independent streams without any bookkeeping.
        identity = f"{self.seed}/{purpose}/{sample.sample_id}/{sample.epoch}/{sample.occurrence}"
        digest = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
