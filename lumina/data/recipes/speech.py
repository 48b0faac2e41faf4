"""Words spoken by espeak-ng's voices, as spectrograms and sound with captions."""

import io
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.recipes.digits import WORDS
from lumina.data.recipes.generating import Draws, Progress, Summary, check_seed, generate_shards, npy

Spectrogram = Callable[[np.ndarray], np.ndarray]
"""Sound float32 (samples,) in [-1, 1] → values (bands, samples // HOP) in about [-1, 1]."""

SAMPLE_RATE = 22050
HOP = 256

VOICES = tuple(
    f"{accent}+{variant}"
    for accent in ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029")
    for variant in ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4")
)
"""Of the set that models are trained on: accent and speaker."""

HELD_VOICES = tuple(
    f"{accent}+{variant}" for accent in ("en-gb-x-gbclan", "en-gb-x-gbcwmd") for variant in ("m6", "m7", "m8", "f5")
)
"""Kept apart, for judges: neither their accents nor their speakers are among VOICES."""

WORDS_A_MINUTE = (215, 290)
PITCHES = (30, 70)
"""From and up to, without the last; of espeak-ng's 0 … 99."""

PEAK = 0.9
_QUIET = 0.01  # below this share of its peak a word has not begun, or is over
_MARGIN = 110  # samples, 5 ms, that are kept before and behind it
_PATIENCE = 60  # seconds, for a word

_OPENINGS = (
    "say ", "please say ", "a voice says ", "someone says ", "speak ", "a voice reading ", "pronounce ", "listen to ",
    "read aloud ", "I hear ", "now say ", "a speaker says ", "utter ", "the sound of ",
)  # fmt: skip
_SUBJECTS = (
    "{word}",
    "the word {word}",
    "the number {word}",
    "the digit {word}",
    "the word for {numeral}",
    "{numeral}",
)
_ENDINGS = (
    "", " aloud", " clearly", ", spoken", " in English", " out loud", " once", ", as speech", " into a microphone",
    ", please", " on a recording", " with a synthetic voice",
)  # fmt: skip

WORDINGS = tuple("".join(parts) for parts in product(_OPENINGS, _SUBJECTS, _ENDINGS))
"""Captions of the training shards, each sample having one of them."""

HELD_WORDINGS = (
    "a recording of the word {word}",
    "speech: {word}",
    "tell me the number {numeral} aloud",
    "one hears a voice that says the digit {word}",
)
"""Sentences in no training shard, to see whether a model follows prompts it was not trained on."""


@dataclass(frozen=True)
class _Recipe:
    spectrogram: Spectrogram
    voices: tuple[str, ...]
    width: int
    seed: int
    program: str

    def __call__(self, number: int) -> dict[str, Any]:
        draws = Draws("speech", self.seed, number)
        digit = number % len(WORDS)  # each comes equally often
        voice, wording = draws.choice(self.voices), draws.below(len(WORDINGS))
        speed, pitch = (low + draws.below(high - low) for low, high in (WORDS_A_MINUTE, PITCHES))
        spoken = _trimmed(_speak(self.program, WORDS[digit], voice, speed, pitch))
        room = self.width * HOP
        if len(spoken) > room:
            raise ValueError(
                f"{WORDS[digit]!r} by the voice {voice} lasts {len(spoken) / SAMPLE_RATE:.2f} s, and {self.width} "
                f"columns hold {room / SAMPLE_RATE:.2f} s; take a width of at least {-(-len(spoken) // HOP)}"
            )
        # What is stored is what the spectrogram is made of.
        levels = np.zeros(room, "<i2")
        levels[: len(spoken)] = np.round(spoken * 32767)
        values = self.spectrogram(levels.astype(np.float32) / 32768).astype(np.float16)
        # Mean and deviation of one crop of one frame: (1, 1, 2, bands, columns).
        moments = np.stack([values, np.zeros_like(values)])[None, None]
        return {
            "__key__": f"speech-{number:06d}",
            "wav": _wav(levels),
            "latent.npy": npy(moments),
            "txt": caption_for(digit, WORDINGS[wording]),
            "json": {
                "label": digit,
                "voice": voice,
                "words_a_minute": speed,
                "pitch": pitch,
                "seconds": len(spoken) / SAMPLE_RATE,
                "wording": wording,
            },
        }


def write_speech(
    out: str | Path,
    spectrogram: Spectrogram,
    *,
    count: int = 1500,
    width: int = 48,
    held: bool = False,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write spoken names of the digits to `out` in shards of at most 250.

    A sample has the members .wav (16 bits, mono, 22,050 a second, width · 256 samples), .latent.npy (float16 (1, 1, 2,
    bands, width): its spectrogram, and zeros for the deviation, as `lumina data encode` writes latents), .txt (a
    caption of WORDINGS) and .json ({"label": digit, "voice", "words_a_minute", "pitch", "seconds": that the word lasts,
    "wording": its number}). A word begins at most 5 ms after the start, peaks at 0.9, and silence follows it.

    Args:
        out: a new or empty folder.
        spectrogram: `lumina.encoders.speech.normalised_mel`, or another; can be sent to another process.
        count: samples, ≥ 1; the words take turns.
        width: columns, of 256 samples each: a multiple of the model's patch size.
        held: by HELD_VOICES instead of VOICES.
        seed: chooses voices, speeds, pitches and wordings.
        workers: processes; the bytes depend on neither them nor the machine, only on the version of espeak-ng.
        progress: called with (samples so far, samples in all).

    Raises:
        ValueError: espeak-ng is absent or fails; a number is out of range; a word is longer than the width; the folder
            is not empty or cannot be written.
    """
    check_seed(seed)
    if width < 1:
        raise ValueError(f"the width must be at least 1, not {width}")
    program = shutil.which("espeak-ng")
    if program is None:
        raise ValueError(
            "the words are spoken by espeak-ng, which is not installed; on Debian and Ubuntu: apt-get install espeak-ng"
        )
    voices = HELD_VOICES if held else VOICES
    make = _Recipe(spectrogram, voices, width, seed, program)
    return generate_shards(out, make, count, name="speech", samples_per_shard=250, workers=workers, progress=progress)


def caption_for(digit: int, wording: str) -> str:
    """A sentence of WORDINGS or HELD_WORDINGS about the name of `digit`, 0 … 9."""
    return wording.format(word=WORDS[digit], numeral=digit)


def held_prompts(digit: int) -> list[str]:
    """The prompts for the name of `digit`, 0 … 9, that no training caption uses."""
    if not 0 <= digit <= 9:
        raise ValueError(f"a digit is a number from 0 to 9, not {digit}")
    return [caption_for(digit, wording) for wording in HELD_WORDINGS]


def _speak(program: str, word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """The sound, float64 in [-1, 1]."""
    with tempfile.TemporaryDirectory(prefix="lumina-speech-") as folder:
        path = Path(folder) / "word.wav"  # of a pipe espeak-ng cannot say how long the sound is
        command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), word]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, text=True, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"espeak-ng does not speak ({error})") from error
        said = (done.stderr or done.stdout).strip().splitlines()
        if done.returncode or not path.is_file():
            raise ValueError(
                f"espeak-ng does not speak with the voice {voice} ({said[0] if said else 'no reason given'})"
            )
        with wave.open(str(path)) as file:
            form = file.getframerate(), file.getnchannels(), file.getsampwidth()
            if form != (SAMPLE_RATE, 1, 2):
                raise ValueError(
                    f"espeak-ng's voice {voice} has (rate, channels, bytes) {form}, not {SAMPLE_RATE, 1, 2}"
                )
            return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def _trimmed(sound: np.ndarray) -> np.ndarray:
    """Without the silence around it, at a peak of PEAK."""
    loud = np.flatnonzero(np.abs(sound) > _QUIET * np.abs(sound).max(initial=0))
    if not len(loud):
        raise ValueError("espeak-ng gave silence")
    start, stop = loud[0] - _MARGIN, loud[-1] + 1 + _MARGIN
    return sound[max(0, start) : stop] * (PEAK / np.abs(sound).max())


def _wav(levels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(levels.tobytes())
    return stream.getvalue()
