"""Sound to mel spectrograms and back: what a model of speech is trained on, and what is heard of its samples.

The spectrogram is HiFi-GAN's, so that its vocoders can read what a model draws: 22,050 samples a second, a Hann window
of 1024, a step of 256, 80 mel bands (Slaney's scale and norm) from 0 to 8000 Hz, and the natural logarithm of their
amplitudes, which are at least 1e-5.
"""

import math
import wave
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

SAMPLE_RATE = 22050
MELS = 80
FFT = 1024
HOP = 256
HIGHEST = 8000.0
"""Hertz; the upper end of the last band."""

FLOOR = 1e-5
LOWEST_LOG = math.log(FLOOR)
HIGHEST_LOG = 2.0
"""The ends of the range that `normalise` maps to [-1, 1]; sound of full scale reaches about 2."""

_EDGE = (FFT - HOP) // 2
_Values = TypeVar("_Values", np.ndarray, Tensor)


def mel_spectrogram(waveform: Float[np.ndarray, "samples"]) -> Float[np.ndarray, "80 frames"]:
    """Logarithms of the mel amplitudes of sound in [-1, 1], float32; frames = samples // 256.

    Row 0 is the lowest band. Frame k looks at the 1024 samples around number 256·k + 128; at its ends the sound is
    mirrored.

    Raises:
        ValueError: for sound of at most 384 samples, or with numbers that are not finite.
    """
    if len(waveform) <= _EDGE:
        raise ValueError(f"a spectrogram needs more than {_EDGE} samples of sound, not {len(waveform)}")
    if not np.isfinite(waveform).all():
        raise ValueError("the sound holds numbers that are not finite")
    padded = np.pad(waveform.astype(np.float64), _EDGE, mode="reflect")
    # In float64 and NumPy: the same whatever the number of threads.
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    amplitudes = np.abs(np.fft.rfft(windows * _hann(), axis=1))
    return np.log(np.maximum(mel_filters() @ amplitudes.T, FLOOR)).astype(np.float32)


def normalise(mel: _Values) -> _Values:
    """Log amplitudes → about [-1, 1]: silence is -1 and ln 1e-5, 1 is 2."""
    return (mel - LOWEST_LOG) * (2 / (HIGHEST_LOG - LOWEST_LOG)) - 1


def denormalise(values: _Values) -> _Values:
    """What `normalise` inverts; nothing is cut off."""
    return (values + 1) * ((HIGHEST_LOG - LOWEST_LOG) / 2) + LOWEST_LOG


def normalised_mel(waveform: Float[np.ndarray, "samples"]) -> Float[np.ndarray, "80 frames"]:
    """`normalise` of `mel_spectrogram`."""
    return normalise(mel_spectrogram(waveform))


def griffin_lim(
    mel: Float[np.ndarray, "80 frames"], iterations: int = 60, seed: int = 0
) -> Float[np.ndarray, "samples"]:
    """Sound, float32, 256 samples a frame, whose `mel_spectrogram` is near `mel` (Griffin and Lim, by librosa).

    Args:
        mel: log amplitudes.
        iterations: more are better and slower.
        seed: of the phases that it starts from.

    Raises:
        ValueError: for another number of bands, no frames, numbers that are not finite, or without librosa.
    """
    if mel.ndim != 2 or mel.shape[0] != MELS or mel.shape[1] < 1:
        raise ValueError(f"sound is made of a spectrogram ({MELS}, frames), not {tuple(mel.shape)}")
    if not np.isfinite(mel).all():
        raise ValueError("the spectrogram holds numbers that are not finite")
    try:
        import librosa
    except ImportError as error:
        raise ValueError("sound from spectrograms needs librosa: pip install 'lumina-t2x[speech]'") from error
    # Frames are added at both ends, for the sound is weakly determined there; they are cut off again.
    amplitudes = np.exp(np.pad(mel.astype(np.float64), ((0, 0), (2, 2)), mode="edge"))
    spectrum = librosa.feature.inverse.mel_to_stft(
        amplitudes, sr=SAMPLE_RATE, n_fft=FFT, power=1.0, fmin=0.0, fmax=HIGHEST
    )
    sound = librosa.griffinlim(spectrum, n_iter=iterations, hop_length=HOP, n_fft=FFT, random_state=seed)
    # librosa's frame 2 is centred on sample 512, our frame 0 on 128.
    return sound[512 - 128 :][: mel.shape[1] * HOP].astype(np.float32)


def write_wav(path: str | Path, waveform: Float[np.ndarray, "samples"]) -> None:
    """Write 16-bit mono sound of 22,050 samples a second; what exceeds [-1, 1] is made softer as a whole.

    Raises:
        ValueError: numbers are not finite, or the file cannot be written.
    """
    if not np.isfinite(waveform).all():
        raise ValueError("the sound holds numbers that are not finite")
    levels = np.round(waveform / max(1.0, float(np.abs(waveform).max(initial=0))) * 32767).astype("<i2")
    try:
        with open(path, "wb") as stream, wave.open(stream, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(levels.tobytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror})") from error


@lru_cache(maxsize=1)
def mel_filters() -> Float[np.ndarray, "80 513"]:
    """The weights of the FFT's amplitudes in each band: triangles of area 1 over frequencies in hertz (Slaney)."""
    edges = _hertz(np.linspace(0.0, _mel(HIGHEST), MELS + 2))
    frequencies = np.arange(FFT // 2 + 1) * (SAMPLE_RATE / FFT)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2 / (high - low)


_LINEAR = 200 / 3
"""Slaney's mel scale: so many hertz a mel up to 1000 Hz, and from there a factor of 6.4 in 27 mels."""


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, mels * _LINEAR, 1000 * 6.4 ** ((mels - 15) / 27))


@lru_cache(maxsize=1)
def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)
