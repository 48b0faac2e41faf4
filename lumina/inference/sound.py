"""Samples that are spectrograms, as sound and as a picture."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lumina.encoders.speech import HOP, MELS, SAMPLE_RATE, denormalise, griffin_lim, write_wav

Synthesis = Callable[[np.ndarray], np.ndarray]
"""Log mel amplitudes (80, frames) to sound (samples,)."""


def columns_of(seconds: float, multiple: int) -> int:
    """The width of a spectrogram that lasts at least so long, a multiple of the pixels that make a patch.

    Raises:
        ValueError: for a duration that is no positive number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds is {seconds:g}; it must be more than 0")
    columns = math.ceil(samples_of(seconds) / HOP)
    return -(-columns // multiple) * multiple


def samples_of(seconds: float) -> int:
    """At 22,050 a second; at least one."""
    return max(1, round(seconds * SAMPLE_RATE))


def spectrogram_image(values: Float[Tensor, "80 frames"]) -> Image.Image:
    """Grey, the lowest band at the bottom; black is silence (-1), white full scale (1)."""
    levels = ((values.float().cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels[::-1]))


def save_sound(
    values: Float[Tensor, "80 frames"], path: Path, seconds: float | None = None, synthesis: Synthesis = griffin_lim
) -> None:
    """Write a WAV, and beside it under the same name the spectrogram as PNG.

    Args:
        values: a normalised spectrogram, row 0 the lowest band.
        path: ends in `.wav`.
        seconds: that the sound lasts at most; None: 256 samples a column.
        synthesis: Griffin and Lim's, or a `lumina.encoders.vocoder.Vocoder`.

    Raises:
        ValueError: without librosa, where that is what makes the sound; or as `write_wav`.
    """
    sound = synthesis(denormalise(values.float().cpu().numpy()))
    write_wav(path, sound if seconds is None else sound[: samples_of(seconds)])
    spectrogram_image(values).save(path.with_suffix(".png"))


def spectrogram_of(pixels: Float[Tensor, "f c h w"]) -> Float[Tensor, "80 w"]:
    """The spectrogram that a decoded sample is.

    Raises:
        ValueError: where it is another shape than one frame of one channel and 80 rows.
    """
    frames, channels, rows, _ = pixels.shape
    if (frames, channels, rows) != (1, 1, MELS):
        raise ValueError(
            f"sound is made of one frame with one channel and {MELS} rows (mel bands); these samples have {frames}, "
            f"{channels} and {rows}"
        )
    return pixels[0, 0]
