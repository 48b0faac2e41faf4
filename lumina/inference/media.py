"""Samples as files: a picture, a film, or frames on a sheet."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumina.inference.images import contact_sheet

DEFAULT_FPS = 8.0
FASTEST = {"mp4": 120.0, "gif": 50.0}
"""Frames a second. A GIF counts hundredths of a second, and browsers slow down what is faster than two of them."""

SMALLEST_FILM = 128
"""Pixels. The colours of an MP4 are stored at half the resolution, so that small frames would lose theirs, and players
blur what they magnify."""

# In order of preference; the last is in every build.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_BT709, _LIMITED = 1, 1  # as FFmpeg numbers colour spaces and ranges

Frames = Sequence[Image.Image]


def save_png(frames: Frames, path: Path) -> None:
    """Write the only frame.

    Raises:
        ValueError: for several frames.
    """
    if len(frames) != 1:
        raise ValueError(f"a PNG holds one frame, not {len(frames)}; write mp4, gif, or a sheet")
    frames[0].save(path)


def save_sheet(frames: Frames, path: Path) -> None:
    """Write a PNG with the frames row by row on a grid about as wide as high, magnified as `contact_sheet` does."""
    contact_sheet(frames, math.ceil(math.sqrt(len(frames)))).save(path)


def save_gif(frames: Frames, path: Path, fps: float = DEFAULT_FPS) -> None:
    """Write an endless animation: grey as it is, colours in at most 256 a frame.

    Raises:
        ValueError: for more than 50 frames a second.
    """
    check_fps("gif", fps)
    # Milliseconds, in tens: rounded so that the whole lasts as long as it should.
    ends = [round(100 * (number + 1) / fps) * 10 for number in range(len(frames))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def save_mp4(frames: Frames, path: Path, fps: float = DEFAULT_FPS) -> None:
    """Write H.264 (MPEG-4 Part 2 where PyAV's build has no encoder for it), YUV 4:2:0, BT.709.

    Frames whose shorter side is below 128 pixels are magnified by the least even whole number that brings it there; an
    odd side of others grows by one, which repeats the last row or column.

    Raises:
        ValueError: for more than 120 frames a second, or without PyAV.
    """
    check_fps("mp4", fps)
    av = _pyav()
    films = [_film_frame(frame) for frame in frames]
    height, width = films[0].shape[:2]
    name = next(name for name in _ENCODERS if name in av.codecs_available)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(name, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the file does not depend on the number of cores
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        if name == "libx264":
            stream.options = {"crf": "12"}
        else:
            stream.bit_rate = max(200_000, int(4 * width * height * fps))
        for number, film in enumerate(films):
            frame = av.VideoFrame.from_ndarray(film, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


SAVE: dict[str, Callable[..., None]] = {"png": save_png, "gif": save_gif, "mp4": save_mp4, "sheet": save_sheet}
SUFFIX = {"png": ".png", "gif": ".gif", "mp4": ".mp4", "sheet": ".png", "wav": ".wav"}


def check_format(kind: str, frames: int, fps: float | None) -> None:
    """Whether samples of so many frames can be written as `kind`, here.

    Raises:
        ValueError: for a format of other numbers of frames, a rate that it does not have, or without PyAV.
    """
    if kind in ("png", "wav") and frames > 1:
        what = "a PNG holds one frame; take mp4, gif, or sheet for" if kind == "png" else "sound has one frame, not"
        raise ValueError(f"--format {kind}: {what} {frames}")
    if kind in ("gif", "mp4", "sheet") and frames == 1:
        raise ValueError(f"--format {kind} is for several frames; take png for one, or ask for more by --frames")
    if fps is not None:
        if kind not in FASTEST:
            raise ValueError(f"--fps is of mp4 and gif; what is written here ({kind}) does not move")
        check_fps(kind, fps)
    if kind == "mp4":
        _pyav()


def check_fps(kind: str, fps: float) -> None:
    """Raises ValueError for a rate that is no positive number or more than `FASTEST`."""
    if not 0 < fps <= FASTEST[kind]:
        raise ValueError(f"{fps:g} frames a second: {kind} takes more than 0 and at most {FASTEST[kind]:g}")


def has_pyav() -> bool:
    """Whether MP4 can be written."""
    return importlib.util.find_spec("av") is not None


def _film_frame(image: Image.Image) -> np.ndarray:
    """(height, width, 3), both even."""
    levels = np.asarray(image.convert("RGB"))
    if min(levels.shape[:2]) < SMALLEST_FILM:
        times = 2 * -(-SMALLEST_FILM // (2 * min(levels.shape[:2])))
        return np.ascontiguousarray(levels.repeat(times, 0).repeat(times, 1))
    height, width = levels.shape[:2]
    return np.pad(levels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("MP4 needs PyAV: pip install 'lumina-t2x[video]', or give --format gif") from error
    return av
