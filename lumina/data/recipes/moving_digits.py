"""Videos of scikit-learn's handwritten digits that move over a black canvas as their captions say."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.order import permutation, random_words
from lumina.data.recipes.digits import WORDS, stored_grey
from lumina.data.recipes.generating import Draws, Progress, Summary, check_seed, generate_shards, npy

SIDE = 8
"""Height and width of a digit, in pixels."""

DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Name → (rows, columns) of a step of one pixel; row 0 is the top."""

_SUBJECTS = (
    "{a_word}", "the {numeral}", "the digit {word}", "the digit {numeral}", "the number {word}",
    "the numeral {numeral}", "a handwritten {word}", "a handwritten {numeral}",
    "a hand-drawn digit {numeral}", "a small grey {word}",
)  # fmt: skip
_MOTIONS = (
    " moving {direction}", " moves {direction}", " going {direction}", " goes {direction}", " travelling {direction}",
    " sliding {direction}", " slides {direction}", " drifting {direction}", " that walks {direction}",
    " on its way {direction}", " floating {direction}", " as it moves {direction}", " flies {direction}",
    " in motion, {direction}", ", it runs {direction}", " pushed {direction}",
)  # fmt: skip
_DIRECTION_WORDS = {
    "left": ("to the left", "left", "leftwards", "towards the left", "to the left side"),
    "right": ("to the right", "right", "rightwards", "towards the right", "to the right side"),
    "up": ("up", "upwards", "to the top", "towards the top", "upward"),
    "down": ("down", "downwards", "to the bottom", "towards the bottom", "downward"),
}
_ENDINGS = (
    "",
    " on a black canvas",
    ", a short video",
    " across the picture",
    " on a dark screen",
    ", please",
    " in a clip",
)

WORDINGS = tuple(
    (subject + motion + ending, words)
    for subject, motion, words, ending in product(_SUBJECTS, _MOTIONS, range(5), _ENDINGS)
)
"""Captions of the training shards: a sentence, and which of the words of a direction stands in it."""

HELD_WORDINGS = (
    ("a video of the digit {word} that moves {direction}", 0),
    ("show me {a_word}, wandering {direction}", 1),
    ("the figure {numeral} leaves {direction}", 2),
    ("a clip in which the number {numeral} is heading {direction}", 3),
)
"""Sentences in no training shard, to see whether a model follows prompts it was not trained on."""

HELD_DIGITS_EVERY = 5
"""Every so many of scikit-learn's digits, those with number % 5 == 4, are in no video: judges can be tried on them."""

SPEEDS = (1, 2)
"""Pixels a frame."""


@dataclass(frozen=True)
class _Recipe:
    frames: int
    size: int
    seed: int

    def __call__(self, number: int) -> dict[str, Any]:
        images, digits = real_digits()
        numbers = training_numbers()
        draws = Draws("moving digits", self.seed, number)
        # Every digit is used before one is used again.
        turn, place = divmod(number, len(numbers))
        chosen = int(numbers[_shuffled(self.seed, turn, len(numbers))[place]])
        direction = draws.choice(tuple(DIRECTIONS))
        speed = draws.choice([speed for speed in SPEEDS if speed * (self.frames - 1) <= self.size - SIDE])
        (down, across), travel = DIRECTIONS[direction], speed * (self.frames - 1)
        row, column = (self._start(draws, step * travel) for step in (down, across))
        canvas = np.zeros((self.frames, self.size, self.size, 1), np.uint8)
        for frame in range(self.frames):
            top, left = row + down * speed * frame, column + across * speed * frame
            canvas[frame, top : top + SIDE, left : left + SIDE, 0] = images[chosen]
        digit, wording = int(digits[chosen]), draws.below(len(WORDINGS))
        return {
            "__key__": f"moving-digit-{number:06d}",
            "npy": npy(canvas),
            "txt": caption_for(digit, direction, WORDINGS[wording]),
            "json": {
                "label": digit,
                "direction": direction,
                "pixels_a_frame": speed,
                "start": [row, column],
                "digit_number": chosen,
                "wording": wording,
            },
        }

    def _start(self, draws: Draws, travel: int) -> int:
        """Where the digit's first row or column lies so that it stays on the canvas while it goes `travel` pixels."""
        return max(0, -travel) + draws.below(self.size - SIDE - abs(travel) + 1)


def write_moving_digits(
    out: str | Path,
    *,
    count: int = 3000,
    frames: int = 4,
    size: int = 16,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write videos to `out` in shards of at most 500.

    A sample has the members .npy (uint8 (frames, size, size, 1), the digit's pixels as `write_digits` stores them, on
    black), .txt (a caption of WORDINGS) and .json ({"label": digit, "direction", "pixels_a_frame", "start": [row,
    column] of the digit's first pixel in the first frame, "digit_number": of scikit-learn's, "wording": its number}).

    Args:
        out: a new or empty folder.
        count: videos, ≥ 1.
        frames: of each, ≥ 2.
        size: height and width in pixels, at least 8 + frames - 1, for a digit moves by one or two pixels a frame.
        seed: chooses digits, directions, places and wordings.
        workers: processes; the bytes do not depend on it.
        progress: called with (samples so far, samples in all).

    Raises:
        ValueError: a number is out of range; the folder is not empty or cannot be written.
    """
    check_seed(seed)
    if frames < 2:
        raise ValueError(f"a digit moves over at least 2 frames, not {frames}")
    if size < SIDE + frames - 1:
        raise ValueError(
            f"a digit of {SIDE} pixels that moves over {frames} frames needs a canvas of at least {SIDE + frames - 1} "
            f"pixels, not {size}"
        )
    make = _Recipe(frames, size, seed)
    return generate_shards(out, make, count, name="moving-digits", workers=workers, progress=progress)


def caption_for(digit: int, direction: str, wording: tuple[str, int]) -> str:
    """A sentence of WORDINGS or HELD_WORDINGS about `digit`, 0 … 9, and one of DIRECTIONS."""
    sentence, which = wording
    word = WORDS[digit]
    a_word = f"an {word}" if word == "eight" else f"a {word}"
    return sentence.format(word=word, a_word=a_word, numeral=digit, direction=_DIRECTION_WORDS[direction][which])


def held_prompts(digit: int, direction: str) -> list[str]:
    """The prompts for `digit`, 0 … 9, moving in one of DIRECTIONS, that no training caption uses."""
    if not 0 <= digit <= 9:
        raise ValueError(f"a digit is a number from 0 to 9, not {digit}")
    if direction not in DIRECTIONS:
        raise ValueError(f"a direction is one of {', '.join(DIRECTIONS)}, not {direction!r}")
    return [caption_for(digit, direction, wording) for wording in HELD_WORDINGS]


def training_numbers() -> np.ndarray:
    """Numbers of scikit-learn's digits that are in videos, ascending."""
    return np.setdiff1d(np.arange(len(real_digits()[1])), held_numbers())


def held_numbers() -> np.ndarray:
    """Numbers of scikit-learn's digits that are in no video, ascending."""
    return np.arange(HELD_DIGITS_EVERY - 1, len(real_digits()[1]), HELD_DIGITS_EVERY)


@lru_cache(maxsize=1)
def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey as it is stored, uint8 (n, 8, 8), and the digits 0 … 9, int64 (n,)."""
    from sklearn.datasets import load_digits  # a second of import, paid by these recipes alone

    data = load_digits()
    return stored_grey(data.images), data.target.astype(np.int64)


@lru_cache(maxsize=4)
def _shuffled(seed: int, turn: int, count: int) -> np.ndarray:
    """The order in which the digits are used for the turn-th time."""
    return permutation(random_words(count, "moving digits order", seed, turn))
