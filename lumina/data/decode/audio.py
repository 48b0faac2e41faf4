"""Audio as one waveform at the sample rate asked for."""

import io
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lumina.data.decode.errors import BadSampleError, unreadable

AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "mp3")
MAX_AUDIO_VALUES = 2**28
"""Bound on samples × channels: an hour and a half of stereo at 24 kHz, 1 GiB of float32."""

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG")
_RATES = range(1000, 768_001)
_BLOCK = 2**16
_LARGEST_STEP = 2**15
_ZEROS = 32  # of the low-pass filter, on either side of its middle


def audio_duration(data: bytes) -> float:
    """Seconds, from the header; `BadSampleError` where that cannot be read."""
    with _Reader(data) as file:
        return file.frames / file.rate


def waveform_of(data: bytes, sample_rate: int | None) -> np.ndarray:
    """The mean of the channels, resampled: float32 (⌈samples · sample_rate / its own rate⌉,) in [-1, 1].

    Without `sample_rate` it keeps its own.

    Raises:
        BadSampleError: no WAV, FLAC, Ogg or MP3; or cut, damaged, empty or too long.
        ValueError: `sample_rate` is not of 1000 … 768000.
    """
    if sample_rate is not None and sample_rate not in _RATES:
        raise ValueError(f"audio is resampled to {_RATES[0]} … {_RATES[-1]} samples a second, not {sample_rate}")
    with _Reader(data) as file:
        wave, rate = file.read(), file.rate
    sample_rate = sample_rate or rate
    if not np.isfinite(wave).all():
        raise BadSampleError("audio holds numbers that are not finite")
    # Lossy formats overshoot a little; integers stored as float are a mistake of whoever wrote them.
    if (peak := np.abs(wave).max()) > 4:
        raise BadSampleError(f"audio reaches {peak:g} where 1 is full scale")
    if len(wave) * sample_rate > MAX_AUDIO_VALUES * rate:
        raise BadSampleError(f"audio at {sample_rate} Hz is longer than {MAX_AUDIO_VALUES} samples")
    return _resampled(wave, rate, sample_rate).clip(-1, 1)


class _Reader:
    """A sound file in memory, checked; use as a context."""

    def __init__(self, data: bytes) -> None:
        try:
            import soundfile
        except ImportError as error:
            raise ValueError("audio needs soundfile: pip install 'lumina-t2x[audio]'") from error
        _check_end(data)
        self._error = soundfile.SoundFileError
        try:
            self._file = soundfile.SoundFile(io.BytesIO(data))
        except self._error as error:
            raise unreadable("audio", error) from error
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.frames = self._file.frames
        problem = None
        if self._file.format not in _FORMATS:
            problem = f"audio is {self._file.format}; WAV, FLAC, Ogg and MP3 are read"
        elif self.rate not in _RATES:
            problem = f"audio has {self.rate} samples a second, not {_RATES[0]} … {_RATES[-1]}"
        elif self.frames >= 2**62:
            problem = "audio does not say how long it is, as FLAC from a pipe; write it to a file instead"
        elif self.frames * self.channels > MAX_AUDIO_VALUES:
            problem = f"audio of {self.frames} samples × {self.channels} is larger than {MAX_AUDIO_VALUES}"
        elif self.frames < 1:
            problem = "audio has no samples"
        if problem:
            self._file.close()
            raise BadSampleError(problem)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> np.ndarray:
        """The mean of the channels; `BadSampleError` where fewer samples decode than are promised."""
        blocks, found = [], 0
        while found < self.frames:
            try:
                block = self._file.read(_BLOCK, dtype="float32", always_2d=True)
            except self._error as error:
                raise unreadable("audio", error) from error
            if not len(block):
                break
            found += len(block)
            blocks.append(block.mean(1, dtype=np.float32))
        if found != self.frames:
            raise BadSampleError(f"audio is cut or damaged: {found} samples of {self.frames} decode")
        return np.concatenate(blocks)


def _check_end(data: bytes) -> None:
    """`BadSampleError` for a cut WAV or Ogg, which libsndfile would serve as a shorter one."""
    if data[:4] == b"RIFF":
        start = 12
        while start + 8 <= len(data):
            size = int.from_bytes(data[start + 4 : start + 8], "little")
            if data[start : start + 4] == b"data":
                if size != 0xFFFFFFFF and start + 8 + size > len(data):  # that is how streams say "unknown"
                    raise BadSampleError(f"audio is cut: {len(data)} bytes of {start + 8 + size}")
                return
            start += 8 + size + size % 2
    elif data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        table = data[page + 27 : page + 27 + (data[page + 26] if page + 26 < len(data) else 0)]
        end = page + 27 + len(table) + sum(table)
        if page + 27 > len(data) or end > len(data) or not data[page + 5] & 4:
            raise BadSampleError("audio is cut: its last page does not end the stream")


@lru_cache(maxsize=8)
def _filter(up: int, down: int) -> np.ndarray:
    """Kaiser-windowed sinc, flat to 0.91 and 80 dB down from 1.0 of the lower of the two Nyquist frequencies."""
    from scipy.signal import firwin

    widest = max(up, down)
    return firwin(2 * _ZEROS * widest + 1, 0.955 / widest, window=("kaiser", 8.0))


def _resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    # All usual rates are exact; a damaged or odd one may be off by a billionth, for a filter of bounded length.
    ratio = Fraction(wanted, rate).limit_denominator(_LARGEST_STEP)
    up, down = ratio.numerator, ratio.denominator
    return resample_poly(wave, up, down, window=_filter(up, down).astype(np.float32)).astype(np.float32)
