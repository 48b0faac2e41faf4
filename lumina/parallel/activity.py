"""What the main thread of a rank is at, as it marks it itself: a write of two attributes, at no cost to the step."""

from dataclasses import dataclass
from enum import IntEnum


class Phase(IntEnum):
    """Stretches of a run, those of a step in their order: a rank in an earlier one is behind."""

    OPENING = 0
    DATA = 1
    BATCH = 2
    OPTIMIZER = 3
    TOTALS = 4
    SAVE = 5
    PREVIEW = 6
    CLOSING = 7


_WORDS = {
    Phase.OPENING: "opening the run",
    Phase.DATA: "waiting for data",
    Phase.BATCH: "forward and backward of micro-batch",
    Phase.OPTIMIZER: "the optimizer step",
    Phase.TOTALS: "the totals of the step",
    Phase.SAVE: "saving",
    Phase.PREVIEW: "drawing the preview",
    Phase.CLOSING: "closing the run",
}


@dataclass(frozen=True)
class Straggler:
    """A rank that is steadily slower than its peers: its own time over theirs."""

    rank: int
    ratio: float


class Activity:
    """Written by the main thread, read by the watchdog's."""

    def __init__(self):
        self.at: tuple[int, Phase, int] = (0, Phase.OPENING, 0)
        """Step, phase and micro-batch, in one assignment: a reader never sees half of a change."""
        self.progress = 0
        self.straggler: Straggler | None = None
        """Set by the watchdog, on the first rank."""

    def enter(self, phase: Phase, *, step: int | None = None, batch: int = 0) -> None:
        """The main thread comes to `phase`, of the step that it is in unless another is given."""
        self.at = (self.at[0] if step is None else step, phase, batch)
        self.progress += 1

    def wrote(self) -> None:
        """A part of a save is on its way to the disk: progress, where the main thread waits for nothing else."""
        if self.at[1] is Phase.SAVE:
            self.progress += 1


def in_words(phase: Phase, batch: int) -> str:
    """What a rank in `phase` does."""
    return f"{_WORDS[phase]} {batch}" if phase is Phase.BATCH else _WORDS[phase]
