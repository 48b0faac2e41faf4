"""scikit-learn's 1,797 handwritten digits (UCI, 8×8, 17 levels of grey) as captioned shards: real data, no download."""

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumina.data.order import random_words
from lumina.data.recipes.generating import Summary
from lumina.data.write import write_shards

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_OPENINGS = (
    "", "draw ", "please draw ", "write ", "show me ", "make ", "I would like ", "here is ", "this is ", "we see ",
    "someone wrote ", "a picture of ", "an image of ", "a scan of ", "a drawing of ", "a sketch of ", "can you paint ",
    "how would a person write ", "how do people draw ", "what is the shape of ", "imagine ", "let me have ",
    "an old postman's ", "my friend's ", "a close view of ", "do you know ", "try ", "give us ",
)  # fmt: skip
_SUBJECTS = (
    "{a_word}", "the {numeral}", "the digit {word}", "the digit {numeral}", "the number {word}", "the number {numeral}",
    "the numeral {numeral}", "the figure {word}", "a handwritten digit {word}", "a handwritten {numeral}",
    "a hand-drawn {numeral}", "a small grey {word}",
)  # fmt: skip
_ENDINGS = (
    "", " written by hand", " in handwriting", " in pencil", " on paper", " on a dark background", " for me", "?",
    " drawn by a child", " in white strokes", " with a thick pen", ", slightly blurred", ", at a low resolution",
    " as it might appear", " would be nice", " found in a letter", " from an envelope", ", filling the frame",
    " seems to stand here", ", please", " and nothing else", " like those at school", " of any kind", " looks so",
)  # fmt: skip

WORDINGS = tuple("".join(parts) for parts in product(_OPENINGS, _SUBJECTS, _ENDINGS))
"""Captions of the training shards, each sample having one of them.

There are more than samples: on a dozen wordings a model learns the sentences by heart and fails on new ones,
on many it learns that only the digit matters.
"""

HELD_WORDINGS = (
    "please write the digit {word} for me",
    "what does a handwritten {numeral} look like?",
    "a photograph of the number {word} on a sheet of paper",
    "draw me the numeral {numeral}",
)
"""Sentences in no training shard, to see whether a model follows prompts it was not trained on.

None names a second digit, so that each prompt has one right answer.
"""

_LEVELS = 16  # the grey values of the set are 0 … 16


def write_digits(out: str | Path, seed: int = 0) -> Summary:
    """Write all digits to `out` in shards of at most 500.

    A sample has the members .png (8×8, 8-bit grey), .txt (a caption of WORDINGS) and .json ({"label": digit, "wording":
    its number}). Grey v of 0 … 16 is stored as round(v·255/16), which `pixel_values` inverts.

    Args:
        out: a new or empty folder.
        seed: chooses the wording of each sample.

    Raises:
        ValueError: the folder is not empty or cannot be written.
    """
    from sklearn.datasets import load_digits  # a second of import, paid by this recipe alone

    data = load_digits()
    shards = write_shards(out, _samples(data.images, data.target, seed), name="digits", samples_per_shard=500)
    return Summary(samples=len(data.target), shards=len(shards))


def caption_for(digit: int, wording: str) -> str:
    """A sentence of WORDINGS or HELD_WORDINGS about `digit`, 0 … 9."""
    word = WORDS[digit]
    return wording.format(word=word, a_word=f"an {word}" if word == "eight" else f"a {word}", numeral=digit)


def held_prompts(digit: int) -> list[str]:
    """The prompts for `digit`, 0 … 9, that no training caption uses."""
    if not 0 <= digit <= 9:
        raise ValueError(f"a digit is a number from 0 to 9, not {digit}")
    return [caption_for(digit, wording) for wording in HELD_WORDINGS]


def stored_grey(values: np.ndarray) -> np.ndarray:
    """Values 0 … 16 → uint8 grey as it is stored."""
    return np.round(values * 255 / _LEVELS).astype(np.uint8)


def pixel_values(grey: np.ndarray) -> np.ndarray:
    """uint8 grey of a stored picture → the original values 0 … 16, float64 as scikit-learn has them."""
    return np.round(grey.astype(np.float64) * _LEVELS / 255)


def _samples(images: np.ndarray, digits: np.ndarray, seed: int) -> Iterator[dict[str, Any]]:
    wordings = random_words(len(digits), "digits wording", seed) % np.uint64(len(WORDINGS))
    for number, (image, digit, wording) in enumerate(zip(images, digits.tolist(), wordings.tolist(), strict=True)):
        stored = io.BytesIO()
        Image.fromarray(stored_grey(image)).save(stored, "PNG")
        yield {
            "__key__": f"digit-{number:05d}",
            "png": stored.getvalue(),
            "txt": caption_for(digit, WORDINGS[wording]),
            "json": {"label": digit, "wording": wording},
        }
