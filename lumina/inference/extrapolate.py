"""Sampling at lengths that were not trained on: which of the model's and the solver's means are used, and how far.

A length is a number of tokens of a sample, nextline and nextframe tokens counted, as positions and attention see it.
"""

import math
from dataclasses import dataclass

import numpy as np

from lumina.config.schema import TrainedConfig
from lumina.model.rope import Extrapolation
from lumina.model.tokens import token_count

SCHEMES = ("none", "interpolate", "ntk", "time-aware")
DEFAULT_SWITCH = 0.3
LARGEST_ASPECT = 4  # of the shapes that pictures are brought to at one resolution, either way round


def reached(t: float, bound: float) -> bool:
    """Whether t ≥ bound, both rounded to float32, in which the network sees its times.

    In float64 the third of ten steps is at 0.30000000000000004, and 0.7 in float32 lies below 0.7.
    """
    return bool(np.float32(t) >= np.float32(bound))


@dataclass(frozen=True)
class ExtrapolationSettings:
    """How samples are drawn at a length that is `rope_factor` times the trained one, unless told otherwise.

    rope: what becomes of the rotary angles position · 10000^(-2i/head_dim):
        `none`: nothing.
        `interpolate`: positions are divided by `rope_factor`, so that they lie where trained ones did (position
            interpolation, arXiv 2306.15595).
        `ntk`: the base 10000 is multiplied by `rope_factor`, so that fast pairs turn as trained and the slowest
            rope_factor^(1-2/head_dim) times slower (NTK-aware; as Lumina-T2X, arXiv 2405.05945, section 2.3, and its
            public code, which leaves the exponent of head_dim/(head_dim-2) out).
        `time-aware`: `interpolate` at times t < `rope_switch`, where the whole is laid out of noise (t = 0), and
            `ntk` from t = `rope_switch` on, where detail is. Lumina-Next (arXiv 2406.18583, section 2.2) describes a
            gradual passage by time; this is the one switch of its public code (its "scaling watershed").
    rope_factor: at least 1.
    rope_switch: a time in [0, 1], of `time-aware` alone.
    proportional_attention: scores of self-attention are scaled by sqrt(log(length)/log(trained_length)).
    trained_length: tokens; None where it is not known.
    time_shift: m of `lumina.flow.time.shift_time`.

    Raises:
        ValueError: for a number out of range, or one that the others leave without use.
    """

    rope: str = "none"
    rope_factor: float = 1.0
    rope_switch: float | None = None
    proportional_attention: bool = False
    trained_length: int | None = None
    time_shift: float = 1.0

    def __post_init__(self):
        if self.rope not in SCHEMES:
            raise ValueError(f"rope is {self.rope!r}; it is {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}")
        if not (math.isfinite(self.rope_factor) and self.rope_factor >= 1):
            raise ValueError(f"rope_factor is {self.rope_factor}; it is sampled / trained length, at least 1")
        if self.rope == "none" and self.rope_factor != 1:
            raise ValueError(
                f"rope_factor is {self.rope_factor:g}, but rope is none; choose {', '.join(SCHEMES[1:-1])} or "
                f"{SCHEMES[-1]}"
            )
        if (self.rope == "time-aware") != (self.rope_switch is not None):
            raise ValueError(
                f"rope_switch is {self.rope_switch} and rope {self.rope}; time-aware has a switch, the others none"
            )
        if self.rope_switch is not None and not 0 <= self.rope_switch <= 1:
            raise ValueError(f"rope_switch is {self.rope_switch}; it is a time from 0 (noise) to 1 (data)")
        if self.trained_length is not None and self.trained_length < 2:
            raise ValueError(
                f"trained_length is {self.trained_length}; it is the number of tokens of the longest samples trained "
                "on, at least 2"
            )
        if self.proportional_attention and self.trained_length is None:
            raise ValueError(f"proportional attention needs the length that the model was trained at; {_GIVE_LENGTH}")
        if not (math.isfinite(self.time_shift) and self.time_shift > 0):
            raise ValueError(f"time_shift must be a positive number, not {self.time_shift}; 1 is no shift")

    @property
    def timed(self) -> bool:
        """Whether `at` depends on t."""
        return self.rope == "time-aware"

    def at(self, t: float) -> Extrapolation:
        """What the model is called with at time t."""
        late = self.rope == "ntk" or (self.timed and reached(t, self.rope_switch))
        return Extrapolation(
            rope_scaling_factor=1.0 if late else self.rope_factor,
            ntk_factor=self.rope_factor if late else 1.0,
            base_seqlen=self.trained_length if self.proportional_attention else None,
        )


_GIVE_LENGTH = (
    "this model's folder does not say it, so give trained_length, in tokens (of captioned samples in patches: "
    "frames × rows × (columns + 1) + frames - 1)"
)


def defaults_for(ratio: float, trained_length: int | None = None) -> ExtrapolationSettings:
    """What is used at `ratio` = sampled / trained length where nothing else is asked for.

    Up to 1 all is off. Above it: time-aware with the factor `ratio` and its switch at 0.3 (the public Lumina-Next
    sampler's), proportional attention where `trained_length` is given, and a time shift of sqrt(ratio), which leaves
    a picture of more pixels as noisy as a trained one (arXiv 2403.03206, section 5.3.2).
    """
    if ratio <= 1:
        return ExtrapolationSettings(trained_length=trained_length)
    return ExtrapolationSettings(
        "time-aware", ratio, DEFAULT_SWITCH, trained_length is not None, trained_length, math.sqrt(ratio)
    )


def settings_for(
    length: int,
    trained_length: int | None,
    *,
    rope: str | None = None,
    rope_factor: float | None = None,
    rope_switch: float | None = None,
    proportional_attention: bool | None = None,
    time_shift: float | None = None,
) -> ExtrapolationSettings:
    """`defaults_for` samples of `length` tokens, with what is given in place of the defaults.

    Where `trained_length` is None the ratio counts as 1: all is off but what is given. The factor of a scheme that is
    asked for at a length below the trained one is 1.

    Raises:
        ValueError: as `ExtrapolationSettings`, and for a scheme with neither a trained length nor a factor.
    """
    if trained_length is not None and trained_length < 2:
        ExtrapolationSettings(trained_length=trained_length)  # says what is wrong
    ratio = 1.0 if trained_length is None else max(1.0, length / trained_length)
    defaults = defaults_for(ratio, trained_length)
    scheme = defaults.rope if rope is None else rope
    factor = rope_factor
    if factor is None:
        if scheme in SCHEMES[1:] and trained_length is None:
            raise ValueError(
                f"rope {scheme} needs the length that the model was trained at; {_GIVE_LENGTH}, or rope_factor"
            )
        factor = 1.0 if scheme == "none" else ratio
    switch = DEFAULT_SWITCH if scheme == "time-aware" and rope_switch is None else rope_switch
    return ExtrapolationSettings(
        scheme,
        factor,
        switch,
        defaults.proportional_attention if proportional_attention is None else proportional_attention,
        trained_length,
        defaults.time_shift if time_shift is None else time_shift,
    )


def longest_trained(trained: TrainedConfig | None, multiple: int, nextline: bool) -> int | None:
    """Tokens of the longest samples of a training at that resolution: of all its aspects and with all its frames.

    Args:
        trained: what the run's configuration says; None where it does not.
        multiple: pixels of a patch's side (autoencoder's factor times patch size).
        nextline: whether rows end in a learned token.
    """
    if trained is None or trained.resolution < multiple:
        return None
    patches = (trained.resolution // multiple) ** 2
    # The most columns that a number of rows leaves room for; tall pictures are longest, by their nextlines.
    sizes = ((rows, min(patches // rows, LARGEST_ASPECT * rows)) for rows in range(1, patches + 1))
    longest = max(
        token_count(trained.frames, rows, columns, 1, nextline)
        for rows, columns in sizes
        if rows <= LARGEST_ASPECT * columns
    )
    return longest if longest >= 2 else None
