"""Captions to features: the seeded `bytes` encoder, or a frozen transformers model."""

import hashlib
import re
from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lumina.config.schema import TextConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextEncoder(ABC):
    """A frozen map from captions to features; what every encoder offers.

    The features of a caption are the same whatever else is in the batch. They carry no gradient.

    Attributes:
        width: features a token.
        max_tokens: captions are cut to this many tokens, the leading or null token included.
    """

    width: int
    max_tokens: int

    @abstractmethod
    def describe(self) -> str:
        """One line for people: which encoder, its width, length and precision."""

    @abstractmethod
    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features (n, l, width) and mask (n, l) for a non-empty list of captions."""

    def __call__(self, captions: list[str]) -> tuple[Float[Tensor, "n l width"], Bool[Tensor, "n l"]]:
        """Features in float32 and a mask that is True at tokens, both on the encoder's device.

        l is the token count of the longest caption here, at most `max_tokens`. Tokens come first; what follows
        them is zero and masked. A caption has at least one token: the empty one keeps its BOS or one null token.

        Raises:
            ValueError: for a lone string, no captions, or something that is not text.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"the text encoder takes a list of captions, each a string, not {captions!r:.80}")
        if not captions:
            raise ValueError('the text encoder was given no captions; give "" for a sample without one')
        with torch.no_grad():
            features, mask = self._encode(list(captions))
        # Zeros, not whatever the model made of its padding: a NaN there would survive a multiplication by the mask.
        return features.float().masked_fill(~mask[..., None], 0.0), mask


def build_text_encoder(config: TextConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder `config.encoder` names: `bytes`, or a transformers model by hub name or folder.

    Raises:
        ValueError: for a model that is missing, gated, unreadable or without a text part, for a layer that it does
            not have, and for `max_tokens` beyond what it reads.
    """
    if config.encoder == "bytes":
        return BytesEncoder(config, device)
    raise ValueError(f"text.encoder: {config.encoder!r} is not known")


# Shares of a feature's variance. Half the word itself, so that it stands out; the rest mostly its spelling, so that
# seven, sevens and sevne are neighbours.
_SHARES = {"word": 0.50, "spelling": 0.35, "before": 0.09, "place": 0.06}
_GRAM_BYTES = (2, 3, 4)
_PIECE_BYTES = 24
# East Asian scripts set no spaces: each of their characters is a word.
_EAST_ASIAN = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff"
_WORDS = re.compile(rf"[{_EAST_ASIAN}]|[^\s{_EAST_ASIAN}]+")
_MARKS = re.compile(r"^[\W_]+|[\W_]+$")
_UNIT = np.sqrt((2.0**32 - 1) / 12)  # standard deviation of a uniform 16-bit integer


def _draw(purpose: bytes, data: bytes, width: int) -> np.ndarray:
    """`width` uniform 16-bit integers, a pure function of the arguments on every machine and in every release."""
    digest = hashlib.shake_256(b"lumina bytes 1/" + purpose + b"/" + data).digest(2 * width)
    return np.frombuffer(digest, "<i2").astype(np.float64)


@lru_cache(maxsize=8192)
def _piece_vectors(piece: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(what a piece says of itself, what it says of its right neighbour), each (width,)."""
    word = (_MARKS.sub("", piece) or piece).encode("utf-8", "surrogatepass")
    spelled = b"<" + piece.encode("utf-8", "surrogatepass") + b">"
    grams = [spelled[at : at + size] for size in _GRAM_BYTES for at in range(len(spelled) - size + 1)]
    # Sums of integers are exact in any order, so the result is the same to the last bit everywhere.
    spelling = sum(_draw(b"gram", gram, width) for gram in grams) / np.sqrt(len(grams))
    own = np.sqrt(_SHARES["word"]) * _draw(b"word", word, width) + np.sqrt(_SHARES["spelling"]) * spelling
    return own / _UNIT, np.sqrt(_SHARES["before"]) * _draw(b"before", word, width) / _UNIT


@lru_cache(maxsize=1024)
def _place_vector(place: int, width: int) -> np.ndarray:
    return np.sqrt(_SHARES["place"]) * _draw(b"place", str(place).encode(), width) / _UNIT


class BytesEncoder(TextEncoder):
    """Hashed words: needs no download and no vocabulary, for trying things out. It is not a language model.

    A caption becomes one null token and a token a word (a character in East Asian scripts, 24 bytes of a longer word).
    A token's feature is a sum of seeded random vectors: one for the word (case and outer punctuation dropped), one
    for its spelling (the mean direction of its runs of 2 to 4 UTF-8 bytes, as in fastText, Bojanowski et al. 2017),
    and small ones for the word before it and for its place. Over words, every feature has mean 0 and variance 1. A
    word that training never saw is near words of similar spelling; that `crimson` means red it cannot know.

    Features depend on neither platform nor random state: they are hashes.
    """

    def __init__(self, config: TextConfig, device: str | torch.device = "cpu"):
        if config.layer != -1:
            raise ValueError(f"text.layer: the `bytes` encoder has one layer, so -1, not {config.layer}")
        self.width = config.width
        self.max_tokens = config.max_tokens
        self._device = torch.device(device)
        self._dtype = DTYPES[config.dtype]

    def describe(self) -> str:
        return f"bytes (hashed words, not a language model), width {self.width}, at most {self.max_tokens} tokens"

    def _rows(self, caption: str) -> np.ndarray:
        pieces = [""]  # the null token
        for word in _WORDS.findall(caption.lower()):
            # Whole characters, so that a piece can be encoded; 24 bytes at most where they are ASCII.
            pieces += [word[at : at + _PIECE_BYTES] for at in range(0, len(word), _PIECE_BYTES)]
            if len(pieces) >= self.max_tokens:
                break
        pieces = pieces[: self.max_tokens]
        rows = np.zeros((len(pieces), self.width))
        for place, piece in enumerate(pieces):
            rows[place] = _piece_vectors(piece, self.width)[0] + _place_vector(place, self.width)
            if place:
                rows[place] += _piece_vectors(pieces[place - 1], self.width)[1]
        return rows

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self._rows(caption) for caption in captions]
        features = np.zeros((len(rows), max(map(len, rows)), self.width), np.float32)
        mask = np.zeros(features.shape[:2], bool)
        for number, row in enumerate(rows):
            features[number, : len(row)] = row
            mask[number, : len(row)] = True
        on_device = torch.from_numpy(features).to(self._device, self._dtype)
        return on_device, torch.from_numpy(mask).to(self._device)
