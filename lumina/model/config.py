"""Sizes of a Flag-DiT."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

# Width of the pooled caption and timestep embeddings, from which all modulation is made.
LARGEST_CONDITION_WIDTH = 1024
DEFAULT_CAPTION_WIDTH = 4096


@dataclass(frozen=True)
class FlagDiTConfig:
    """Sizes and variants of a Flag-DiT; text-conditional unless `num_classes` is given.

    patch_size: side of a patch in latents.
    in_channels: channels of a latent.
    dim, n_layers, n_heads: width, blocks, attention heads.
    n_kv_heads: heads of keys and values (grouped-query attention); None: as many as `n_heads`.
    multiple_of, ffn_dim_multiplier: the feed-forward width is int(8·dim/3), times the multiplier where given,
        rounded up to a multiple of `multiple_of`.
    norm_eps: of every RMSNorm.
    learn_sigma: twice the output channels, the second half of them dropped, as in the public models.
    qk_norm: LayerNorm over the full width of queries and keys.
    cap_feat_dim: width of the caption features; None is 4096 (LLaMA-2-7B) in a text-conditional model.
    num_classes: classes of a label-conditional model, which has no text branch and no learned tokens.
    frames: a learned token between frames; needed for samples of more than one frame.

    Raises:
        ValueError: for sizes that do not fit together, naming them.
    """

    patch_size: int = 2
    in_channels: int = 4
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    learn_sigma: bool = True
    qk_norm: bool = True
    cap_feat_dim: int | None = None
    num_classes: int | None = None
    frames: bool = False

    def __post_init__(self):
        self._check_types()
        for name in ("patch_size", "in_channels", "dim", "n_layers", "n_heads", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_kv_heads", "cap_feat_dim", "num_classes", "ffn_dim_multiplier"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"model.{name} must be positive, not {value}")
        if self.dim % self.n_heads:
            raise ValueError(
                f"model.n_heads={self.n_heads} does not divide model.dim={self.dim}; "
                f"the nearest that does is {_nearest_divisor(self.dim, self.n_heads)}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.dim/model.n_heads is {self.head_dim}; rotary embedding turns pairs, so it must be even"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}; "
                f"the nearest that does is {_nearest_divisor(self.n_heads, self.kv_heads)}"
            )
        if self.num_classes is not None:
            if self.cap_feat_dim is not None:
                raise ValueError(
                    "model.num_classes and model.cap_feat_dim are both given; a model is conditioned on labels or "
                    "on captions, so give one of them"
                )
            if self.frames:
                raise ValueError("model.frames needs learned tokens, which a label-conditional model does not have")
        elif self.cap_feat_dim is None:
            object.__setattr__(self, "cap_feat_dim", DEFAULT_CAPTION_WIDTH)

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = get_args(field.type) or (field.type,)
            # A bool is an int to Python and a whole number is a float to its writer; neither surprises here.
            fits = type(value) in allowed or (type(value) is int and float in allowed)
            if not fits:
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
                raise ValueError(f"model.{field.name} is {value!r}; it must be {expected}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward network."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def condition_width(self) -> int:
        return min(self.dim, LARGEST_CONDITION_WIDTH)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def text_conditional(self) -> bool:
        return self.num_classes is None

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> "FlagDiTConfig":
        """From a mapping of the fields, where `preset` names one of `presets.PRESETS` that the others change.

        Raises:
            ValueError: for an unknown key or preset, naming the nearest known one.
        """
        from lumina.model.presets import PRESETS

        settings = dict(settings)
        preset = settings.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"model.preset is {preset!r}; the presets are {', '.join(PRESETS)}")
        known = [field.name for field in fields(FlagDiTConfig)]
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(str(key), [*known, "preset"], n=1, cutoff=0.5)
                hint = f"did you mean model.{close[0]}?" if close else f"the keys here are {', '.join(known)}"
                raise ValueError(f"unknown key model.{key}; {hint}")
        return FlagDiTConfig(**(PRESETS[preset] if preset else {}) | settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as `from_dict` takes them."""
        return asdict(self)


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
