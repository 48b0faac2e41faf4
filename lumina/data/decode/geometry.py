"""What is cut out of a picture or video, and where it lies in the pixels as they are stored."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lumina.data.decode.errors import BadSampleError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused undecoded: the limit above which Pillow, too, suspects a decompression bomb."""

MAX_VIEW_PIXELS = 2**28
"""Bound on frames × height × width of one view: 3 GiB of float32 RGB, 1024 frames of 512×512 pixels."""


class Region(NamedTuple):
    """A part of a picture, in whole pixels."""

    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class View:
    """What is cut out of a picture or video.

    Attributes:
        height: of the result, in pixels.
        width: of the result, in pixels.
        frames: of the result.
        resize: scale to the smallest size that covers (height, width), aspect kept, before cutting; otherwise cut at
            the picture's own scale.
        down: where the cut lies, 0 at the top … 1 at the bottom; every position has an equal share of 0 … 1.
        across: likewise, 0 at the left … 1 at the right.
        flip: mirror the result left to right.
        start: where a clip begins, 0 the earliest … 1 the latest possible frame.
        frame_step: take every n-th frame of the video.

    Raises:
        ValueError: a size below 1, a position outside 0 … 1, or more than `MAX_VIEW_PIXELS` pixels.
    """

    height: int
    width: int
    frames: int = 1
    resize: bool = True
    down: float = 0.5
    across: float = 0.5
    flip: bool = False
    start: float = 0.5
    frame_step: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "frame_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a view must be at least 1, not {getattr(self, name)}")
        for name in ("down", "across", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of a view must lie in 0 … 1, not {getattr(self, name)}")
        if self.frames * self.height * self.width > MAX_VIEW_PIXELS:
            raise ValueError(
                f"a view of {self.frames} × {self.height}×{self.width} pixels is larger than {MAX_VIEW_PIXELS} pixels"
            )


@dataclass(frozen=True)
class Turn:
    """How stored pixels become the picture that is seen: columns and rows are mirrored, then swapped."""

    mirror_columns: bool = False
    mirror_rows: bool = False
    swap: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Size seen (stored) of a picture of the stored (seen) size."""
        return (width, height) if self.swap else (height, width)

    def apply(self, levels: np.ndarray) -> np.ndarray:
        """Stored levels (height, width, channels) as they are seen; a NumPy view."""
        levels = levels[:: -1 if self.mirror_rows else 1, :: -1 if self.mirror_columns else 1]
        return levels.swapaxes(0, 1) if self.swap else levels

    def stored(self, region: Region, height: int, width: int) -> Region:
        """Where a part of what is seen lies in what is stored, which is (height, width) large."""
        top, left, rows, columns = region
        if self.swap:
            top, left, rows, columns = left, top, columns, rows
        if self.mirror_rows:
            top = height - top - rows
        if self.mirror_columns:
            left = width - left - columns
        return Region(top, left, rows, columns)


def position(share: float, slack: int) -> int:
    """One of the positions 0 … slack: each has an equal part of `share` in 0 … 1, and 0.5 gives slack // 2."""
    return max(math.ceil(share * (slack + 1)) - 1, 0)


def region_of(view: View, height: int, width: int) -> Region:
    """The part of a picture, (height, width) large as it is seen, that becomes `view` once it is scaled.

    Cut first and scaled then: no more is scaled than is kept. Whole pixels are cut, so its aspect is that of the view
    up to half a pixel.

    Raises:
        BadSampleError: the view is cut at the picture's own scale, and larger than the picture.
    """
    rows, columns = view.height, view.width
    if view.resize:
        if view.height * width >= view.width * height:
            rows, columns = height, max(min(round(view.width * height / view.height), width), 1)
        else:
            rows, columns = max(min(round(view.height * width / view.width), height), 1), width
    if rows > height or columns > width:
        raise BadSampleError(f"picture of {height}×{width} pixels is smaller than {view.height}×{view.width}")
    return Region(position(view.down, height - rows), position(view.across, width - columns), rows, columns)


def clip_of(view: View, frames: int) -> range:
    """Numbers of the frames that become `view`, of a video of `frames`.

    Raises:
        BadSampleError: the video is too short.
    """
    span = (view.frames - 1) * view.frame_step + 1
    if span > frames:
        raise BadSampleError(f"video has {frames} frames where {span} are needed")
    first = position(view.start, frames - span)
    return range(first, first + span, view.frame_step)
