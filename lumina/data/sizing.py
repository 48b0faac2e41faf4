"""What size samples are trained at: from a picture's or video's own size to that of its view, stage by stage."""

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lumina.data.buckets import buckets, nearest_bucket
from lumina.data.decode import View
from lumina.data.lanes import PlannedSample
from lumina.data.order import random_words
from lumina.data.shard_index import KINDS

IMAGE, VIDEO, AUDIO, LATENT = map(KINDS.index, ("image", "video", "audio", "latent"))


class Shapes(NamedTuple):
    """Of n samples, as the index has them: arrays (n,). Height and width are 0 where the header is bad."""

    kind: np.ndarray
    height: np.ndarray
    width: np.ndarray
    frames: np.ndarray


class Stage(NamedTuple):
    """From this step on pictures have about resolution² pixels; their own size, cropped, where it is None."""

    from_step: int
    resolution: int | None


@dataclass(frozen=True)
class Sizing:
    """Sizes are in pixels and multiples of `multiple`; those of latents count as the pixels they stand for.

    stages: by `from_step`, the first from step 0.
    factor: pixels that a latent's row or column stands for.
    frames, frame_step: a clip of a video has at most so many frames, every n-th of it.
    random_crop, flip: drawn from (seed, sample id, epoch, occurrence); otherwise the middle, never mirrored.
    """

    multiple: int
    stages: tuple[Stage, ...]
    factor: int = 1
    frames: int = 1
    frame_step: int = 1
    random_crop: bool = False
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        starts = [stage.from_step for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"data.stages must start with from_step=0 and go up, not {starts}")
        for stage in self.stages:
            if stage.resolution is not None and (stage.resolution <= 0 or stage.resolution % self.multiple):
                raise ValueError(
                    f"data.resolution={stage.resolution} must be a multiple of {self.multiple} pixels "
                    "(autoencoder times patch size)"
                )

    def stage_of(self, step: int) -> int:
        """Number of the stage that a step belongs to."""
        return bisect.bisect_right([stage.from_step for stage in self.stages], step) - 1

    def sizes(self, shapes: Shapes, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(frames, heights, widths), int64 (n,) each, of the views; all 0 where a sample cannot be used."""
        height, width = shapes.height.astype(np.int64), shapes.width.astype(np.int64)
        frames = np.minimum((shapes.frames.astype(np.int64) - 1) // self.frame_step + 1, self.frames)
        latent = shapes.kind == LATENT
        rows, columns = self._viewed(height, width, self.stages[stage].resolution)
        rows, columns = np.where(latent, height * self.factor, rows), np.where(latent, width * self.factor, columns)
        frames = np.where(latent, shapes.frames, frames)
        usable = (rows > 0) & (columns > 0) & (frames > 0) & (shapes.kind != AUDIO)
        usable &= (rows % self.multiple == 0) & (columns % self.multiple == 0)
        return tuple(np.where(usable, size, 0) for size in (frames, rows, columns))

    def _viewed(self, height: np.ndarray, width: np.ndarray, resolution: int | None) -> tuple[np.ndarray, np.ndarray]:
        if resolution is None:
            return height // self.multiple * self.multiple, width // self.multiple * self.multiple
        choice = buckets(resolution // self.multiple)
        table = np.array(choice, np.int64) * self.multiple
        known = (height > 0) & (width > 0)
        rows, columns = np.zeros_like(height), np.zeros_like(width)
        if known.any():
            rows[known], columns[known] = table[nearest_bucket(height[known], width[known], choice)].T
        return rows, columns

    def view(self, sample: PlannedSample, size: tuple[int, int, int], stage: int) -> View:
        """How a sample is cut to `size` (frames, height, width)."""
        frames, height, width = size
        down = across = start = 0.5
        flip = False
        if self.random_crop or self.flip:
            identity = (self.seed, sample.sample_id, sample.epoch, sample.occurrence)
            draws = _uniform(4, "view", *identity)
            if self.random_crop:
                down, across, start = draws[:3]
            flip = self.flip and draws[3] < 0.5
        resize = self.stages[stage].resolution is not None
        return View(height, width, frames, resize, down, across, flip, start, self.frame_step)

    def crop(self, sample: PlannedSample) -> float:
        """Which of the crops that were encoded beforehand, in [0, 1)."""
        return _uniform(1, "crop", self.seed, sample.sample_id, sample.epoch, sample.occurrence)[0]


def _uniform(count: int, purpose: str, *key: int) -> list[float]:
    """Numbers in [0, 1)."""
    return ((random_words(count, purpose, *key) >> np.uint64(11)) / 2.0**53).tolist()
