"""What `lumina sample` writes of a sample: its size, and the kind of file."""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lumina.encoders.speech import MELS
from lumina.encoders.vae import Vae
from lumina.encoders.vocoder import Vocoder
from lumina.inference.media import DEFAULT_FPS, FASTEST, SAVE, SUFFIX, check_format, has_pyav
from lumina.inference.pipeline import DEFAULT_SIDE, LuminaPipeline
from lumina.inference.sound import columns_of, save_sound, spectrogram_of

Writer = Callable[[Sequence[Image.Image], Tensor, Path], None]
"""Of a sample's frames and latents (F, C, H, W), under a path to which it adds a suffix."""


@dataclass(frozen=True)
class Form:
    """Of all samples of a command, as samples.json says it.

    height, width: pixels; a width that comes of `seconds` is None until the model is known.
    format: one of `lumina.inference.media.SAVE`, or wav.
    fps: of what moves.
    channels: that samples have; None: the model's.
    """

    height: int
    width: int | None
    frames: int
    channels: int | None
    format: str
    fps: float | None
    seconds: float | None
    vocoder: str | None

    @property
    def suffix(self) -> str:
        return SUFFIX[self.format]

    @staticmethod
    def of(arguments: argparse.Namespace) -> "Form":
        """What is asked for, with defaults.

        Raises:
            ValueError: for options that contradict each other, or a format that cannot be written here.
        """
        kind, height, width = arguments.format, arguments.height, arguments.width
        speaks = [name for name in ("seconds", "vocoder") if getattr(arguments, name) is not None]
        if kind == "auto":
            several = "mp4" if has_pyav() else "gif"
            kind = "wav" if speaks else "png" if arguments.frames <= 1 else several
        check_format(kind, arguments.frames, arguments.fps)
        if kind == "wav":
            height, width = _size_of_sound(arguments)
        elif speaks:
            raise ValueError(f"--{speaks[0]} is of sound; --format {kind} has none")
        else:
            height, width = (DEFAULT_SIDE if side is None else side for side in (height, width))
        return Form(
            height=height,
            width=width,
            frames=arguments.frames,
            channels=arguments.channels,
            format=kind,
            fps=(arguments.fps or DEFAULT_FPS) if kind in FASTEST else None,
            seconds=arguments.seconds,
            vocoder=arguments.vocoder,
        )

    def of_model(self, pipeline: LuminaPipeline) -> "Form":
        """With what only the model tells.

        Raises:
            ValueError: for sound of a model that draws pictures.
        """
        if self.format != "wav":
            return self
        vae, channels = pipeline.vae, self.channels
        if channels is None and vae.decodes(1):
            channels = 1
        if channels != 1 and (vae.decodes(1) or vae.pixel_channels != 1):
            drawn = vae.pixel_channels if channels is None else channels
            raise ValueError(f"--format wav: spectrograms have one channel; samples of {drawn} make no sound")
        multiple = vae.factor * pipeline.model.config.patch_size
        width = columns_of(self.seconds, multiple) if self.width is None else self.width
        return replace(self, width=width, channels=channels)

    def writer(self, vae: Vae, device: torch.device) -> Writer:
        """What writes a sample.

        Raises:
            ValueError: for a vocoder that cannot be opened.
        """
        if self.format != "wav":
            save, rate = SAVE[self.format], {} if self.fps is None else {"fps": self.fps}
            return lambda frames, _, stem: save(frames, stem.with_suffix(self.suffix), **rate)
        synthesis = {} if self.vocoder is None else {"synthesis": Vocoder(self.vocoder, device)}

        def speak(_: Sequence[Image.Image], latents: Tensor, stem: Path) -> None:
            values = spectrogram_of(vae.decode(latents))
            save_sound(values, stem.with_suffix(self.suffix), self.seconds, **synthesis)

        return speak


def _size_of_sound(arguments: argparse.Namespace) -> tuple[int, int | None]:
    height, width, seconds = arguments.height, arguments.width, arguments.seconds
    if height not in (None, MELS):
        raise ValueError(f"--height is {height}, but sound is made of {MELS} rows (mel bands); leave it out")
    if seconds is not None and width is not None:
        raise ValueError("--seconds and --width both say how long the sound is; give one of them")
    if seconds is None and width is None:
        raise ValueError("--format wav: say how long by --seconds S, or by --width in columns of 256 samples")
    if seconds is not None:
        columns_of(seconds, 1)
    if arguments.vocoder is None and importlib.util.find_spec("librosa") is None:
        raise ValueError(
            "sound from spectrograms needs librosa (pip install 'lumina-t2x[speech]'), or a --vocoder folder"
        )
    return MELS, width
