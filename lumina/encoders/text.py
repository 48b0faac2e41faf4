"""Captions to features: the seeded `bytes` encoder, or a frozen transformers model."""

import hashlib
import re
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lumina.config.schema import TextConfig
from lumina.encoders._hub import DTYPES, check_complete, reading


class TextEncoder(ABC):
    """A frozen map from captions to features; what every encoder offers.

    The features of a caption are the same whatever else is in the batch. They carry no gradient.

    Attributes:
        width: features a token.
        max_tokens: captions are cut to this many tokens, the leading or null token included.
    """

    width: int
    max_tokens: int
    _device: torch.device

    def compute_on(self, device: torch.device) -> torch.nn.Module | None:
        """Take inputs to `device` from now on.

        Returns:
            The network, None where there is none: it stays where it is, and whoever calls this brings its weights.
        """
        self._device = device
        return None

    @abstractmethod
    def describe(self) -> str:
        """One line for people: which encoder, its width and its length."""

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
    """The encoder `config.encoder` names: `bytes`, `none`, or a transformers model by hub name or folder.

    Raises:
        ValueError: for a model that is missing, gated, unreadable or without a text part, for a layer that it does
            not have, and for `max_tokens` beyond what it reads.
    """
    if config.encoder == "bytes":
        return BytesEncoder(config, device)
    if config.encoder == "none":
        return NoTextEncoder(config)
    return TransformersEncoder(config, device)


# Shares of a feature's variance. Spelling is the largest, so that seven, sevens and sevne are neighbours; the word
# before and the place let a model bind a colour to its shape. Measured against other shares: docs/encoders.md.
_SHARES = {"word": 0.15, "spelling": 0.45, "before": 0.20, "place": 0.20}
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


class NoTextEncoder(TextEncoder):
    """In the place of an encoder where all features were made beforehand."""

    def __init__(self, config: TextConfig):
        self.width, self.max_tokens = config.width, config.max_tokens

    def describe(self) -> str:
        return f"none (features made beforehand, {self.width} wide)"

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        raise ValueError("text.encoder=none takes features made by `lumina data encode`, not captions; name an encoder")


class BytesEncoder(TextEncoder):
    """Hashed words: needs no download and no vocabulary, for trying things out. It is not a language model.

    A caption becomes one null token and a token a word (a character in East Asian scripts, 24 bytes of a longer word).
    A token's feature is a sum of seeded random vectors: one for the word (case and outer punctuation dropped), one
    for its spelling (the mean direction of its runs of 2 to 4 UTF-8 bytes, as in fastText, Bojanowski et al. 2017),
    and one each for the word before it and for its place. Over words, every feature has mean 0 and variance 1. A
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


class TransformersEncoder(TextEncoder):
    """The text trunk of a transformers model: LLaMA, Gemma, Qwen, T5 (its encoder), CLIP (its text part), …

    The public work takes the last hidden state of LLaMA-2-7B at 128 tokens, and of Gemma-2B in its later models.
    Weights are read from safetensors, or from PyTorch files without running code; code that a model brings is never
    run. A missing weight is an error.
    """

    def __init__(self, config: TextConfig, device: str | torch.device = "cpu"):
        import transformers

        self._name = config.encoder
        self._device = torch.device(device)
        self._dtype = DTYPES[config.dtype]
        self.max_tokens = config.max_tokens
        model_at, tokenizer_at = _locate(config.encoder)
        with reading("text.encoder", config.encoder, "text model", transformers):
            settings = transformers.AutoConfig.from_pretrained(model_at, trust_remote_code=False)
            text_settings = settings.get_text_config(encoder=True if settings.is_encoder_decoder else None)
        # None where the config describes no text: a vision model, or a kind of text model that is not known here.
        layers = getattr(text_settings, "num_hidden_layers", None)
        self._vocabulary = getattr(text_settings, "vocab_size", None)
        if layers is None or self._vocabulary is None:
            raise ValueError(f"text.encoder: {self._name} ({settings.model_type}) is not a text model")
        self._index = self._hidden_state_index(config.layer, layers)
        self._tokenizer = self._read_tokenizer(tokenizer_at)
        self._check_length(text_settings)
        model = self._read_trunk(model_at, settings, text_settings)
        if self._index is not None:
            _drop_layers_after(model, layers, self._index)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.width = self._dry_run()

    def compute_on(self, device: torch.device) -> torch.nn.Module | None:
        self._device = device
        return self._model

    def describe(self) -> str:
        hidden = "last hidden state" if self._index is None else f"hidden state {self._index}"
        precision = str(self._dtype).removeprefix("torch.")
        return (
            f"{self._name} ({type(self._model).__name__}, {hidden}, {precision}), width {self.width}, "
            f"at most {self.max_tokens} tokens"
        )

    def _hidden_state_index(self, layer: int, layers: int) -> int | None:
        """None for the last hidden state, which has been through the final norm."""
        count = layers + 1
        if not -count <= layer < count:
            raise ValueError(
                f"text.layer: {self._name} has {count} hidden states, the embeddings and one a layer: "
                f"-{count} to {count - 1}, not {layer}"
            )
        index = layer % count
        return None if index == layers else index

    def _read_tokenizer(self, tokenizer_at: str) -> Any:
        import transformers

        with reading("text.encoder", self._name, "tokenizer", transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_at, trust_remote_code=False)
        # Without its files the library builds some tokenizers with an empty vocabulary and says nothing.
        if len(tokenizer) < self._vocabulary // 2:
            raise ValueError(
                f"text.encoder: the tokenizer of {self._name} has {len(tokenizer)} entries where its model has "
                f"{self._vocabulary}, so tokenizer files are missing; put them beside the model"
            )
        tokenizer.truncation_side = "right"
        # Padding is done here, so a tokenizer needs no pad token and its padding side does not matter.
        null = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        self._null_token = next(token for token in null if token is not None)
        return tokenizer

    def _check_length(self, text_settings: Any) -> None:
        limits = (getattr(text_settings, "max_position_embeddings", None), self._tokenizer.model_max_length)
        most = min(limit for limit in limits if limit)
        if self.max_tokens > most:
            raise ValueError(
                f"text.max_tokens: {self._name} reads at most {most} tokens, not {self.max_tokens}; set it to {most} "
                "or less"
            )
        special = self._tokenizer.num_special_tokens_to_add()
        if self.max_tokens <= special:
            raise ValueError(
                f"text.max_tokens: {self._name} adds {special} tokens to each caption, so at least {special + 1}, "
                f"not {self.max_tokens}"
            )

    def _read_trunk(self, model_at: str, settings: Any, text_settings: Any) -> Any:
        import transformers

        composite = text_settings is not settings and not settings.is_encoder_decoder
        encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        knows = type(settings) in encoders and not composite
        loader = transformers.AutoModelForTextEncoding if knows else transformers.AutoModel
        with reading("text.encoder", self._name, "text model", transformers):
            model, report = loader.from_pretrained(
                model_at,
                config=settings,
                dtype=self._dtype,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
            )
        # Poolers make one vector of a sentence; a checkpoint may lack one and no feature comes from it.
        check_complete("text.encoder", self._name, report, allowed="pooler")
        if composite:
            model = model.get_decoder()
        elif settings.is_encoder_decoder and not knows:
            model = model.get_encoder()
        if getattr(model, "main_input_name", None) != "input_ids":
            raise ValueError(f"text.encoder: {self._name} ({settings.model_type}) does not read text")
        model.config.use_cache = False  # nothing is generated
        return model

    def _dry_run(self) -> int:
        """The width, found by encoding one token, so that a model of another shape fails here and not in training."""
        import transformers

        with torch.no_grad(), reading("text.encoder", self._name, "text model", transformers):
            return self._hidden_state([[self._null_token]])[0].shape[-1]

    def _hidden_state(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), self._null_token)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        mask = mask.to(self._device)
        with torch.autocast(self._device.type, enabled=False):
            output = self._model(
                input_ids=tokens.to(self._device),
                attention_mask=mask.long(),
                output_hidden_states=self._index is not None,
                return_dict=True,
            )
        features = output.last_hidden_state if self._index is None else output.hidden_states[self._index]
        return features, mask

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        # Lone surrogates are no text; the tokenizers refuse them.
        captions = [caption.encode("utf-8", "replace").decode() for caption in captions]
        rows = self._tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]
        # A tokenizer without BOS makes nothing of the empty caption, which must have a token.
        rows = [row or [self._null_token] for row in rows]
        highest = max(map(max, rows))
        if highest >= self._vocabulary:
            raise ValueError(
                f"text.encoder: the tokenizer of {self._name} gives token {highest} where its model knows "
                f"{self._vocabulary}; take the tokenizer that belongs to the model"
            )
        return self._hidden_state(rows)


def _locate(name: str) -> tuple[str, str]:
    """Where the model is and where its tokenizer is, as from_pretrained takes them.

    A folder may be the model's own, a diffusers pipeline (then its first text encoder), or a text encoder inside a
    pipeline, whose tokenizer lies in the folder beside it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, name
    if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    own = any(folder.glob("token*")) or any(folder.glob("vocab*")) or any(folder.glob("*.model"))
    tokenizer = beside if not own and beside != folder and beside.is_dir() else folder
    return str(folder), str(tokenizer)


def _drop_layers_after(model: Any, layers: int, index: int) -> None:
    """Removes layers that hidden state `index` does not need, where the model keeps them in one list.

    Layer number `index` stays, although only its input is needed: what the last layer gives goes through the final
    norm, which is not part of that hidden state.
    """
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers]
    if len(lists) == 1:
        del lists[0][index + 1 :]
