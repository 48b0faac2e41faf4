"""A source as a conversion takes it: some of its tensors left out, the sizes settled, and nothing missing."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lumina.checkpoint.manifest import EMA, MOMENTS, WEIGHTS, FileEntry
from lumina.checkpoint.sources import Source
from lumina.checkpoint.tensor_reader import Stored
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import listed, misfits, new_nextframe_token

NEXTFRAME = "nextframe_token"


class AdaptedSource(Source):
    """`source` without what is dropped, and with a new `nextframe_token` where the model is to have one."""

    def __init__(self, source: Source, sizes: FlagDiTConfig | None = None, drop: Sequence[str] = ()):
        """
        Args:
            source: what is adapted.
            sizes: what a configuration says of the model; None takes the source's.
            drop: patterns of names.

        Raises:
            ValueError: for a pattern that fits nothing, sizes that are not the source's, and tensors that are missing,
                unexpected or of another shape, listing them.
        """
        super().__init__()
        self.original, self._sizes = source, sizes
        for fact in ("format", "path", "config", "settings", "step", "optimizer_steps"):
            setattr(self, fact, getattr(source, fact))
        self.data, self.training, self.software = source.data, source.training, source.software
        self.notes = list(source.notes)
        self.dropped = _matching(drop, source)
        self.initialised: list[str] = []
        self.tensors = {
            kind: {name: stored for name, stored in held.items() if name not in self.dropped}
            for kind, held in source.tensors.items()
        }
        self.model = self._settled(source, sizes)
        with torch.device("meta"):
            model = FlagDiT(self.model)
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        """Of the model's tensors, in its order."""
        self.trained = [name for name, value in model.named_parameters() if value.requires_grad]
        if self.model.frames and any(NEXTFRAME not in self.tensors[kind] for kind in self.weights):
            self.initialised.append(NEXTFRAME)
            self.notes.append(f"{self.path} has no {NEXTFRAME}: it is initialised, and needs training")
            for held in self.tensors.values():
                held.setdefault(NEXTFRAME, Stored(torch.float32, (self.model.dim,)))
        for kind in self.weights:
            self._check_fit(kind)
        self._check_moments()

    @property
    def weights(self) -> list[str]:
        """The kinds of weights that there are."""
        return [kind for kind in (WEIGHTS, EMA) if kind in self.tensors]

    def read(self, kind: str, name: str) -> Tensor:
        if name in self.initialised and name not in self.original.tensors[kind]:
            return torch.zeros(self.model.dim) if kind in MOMENTS else new_nextframe_token(self.model.dim)
        return self.original.read(kind, name)

    def files(self) -> list:
        return self.original.files()

    def check_files(self) -> dict[str, FileEntry]:
        return self.original.check_files()

    def _settled(self, source: Source, sizes: FlagDiTConfig | None) -> FlagDiTConfig:
        has_token = any(NEXTFRAME in self.tensors[kind] for kind in self.weights)
        own = replace(source.model, frames=has_token) if source.model.text_conditional else source.model
        if sizes is None:
            return own
        if has_token and not sizes.frames:
            raise ValueError(
                f"{self.path} has a {NEXTFRAME}, and the configuration says model.frames=false; set it to true, or "
                f"leave the token out by --drop {NEXTFRAME}"
            )
        here, there = _essential(own), _essential(sizes)
        for key, value in there.items():
            if here[key] != value:
                raise ValueError(
                    f"the configuration says model.{key}={value}, but the model in {self.path} has {here[key]}"
                )
        return sizes

    def _check_fit(self, kind: str) -> None:
        held = {name: stored.shape for name, stored in self.tensors[kind].items()}
        if problems := misfits(self.shapes, held):
            problems |= {n: f"{said} (--drop leaves it out)" for n, said in problems.items() if n not in self.shapes}
            model = "model" if self._sizes is None else "model of the configuration"
            raise ValueError(f"{self.path} does not fit the {model}: {listed(problems)}")

    def _check_moments(self) -> None:
        """Moments of every trained parameter, and of no other, or none."""
        present = [kind for kind in MOMENTS if kind in self.tensors]
        for kind in present:
            held = self.tensors[kind]
            if len(present) < len(MOMENTS) or any(
                name not in held or held[name].shape != self.shapes[name] for name in self.trained
            ):
                self.notes.append(f"{self.path} has not the moments of every parameter: the optimizer starts anew")
                self.tensors = {kind: held for kind, held in self.tensors.items() if kind not in MOMENTS}
                self.optimizer_steps = 0
                return
            self.tensors[kind] = {name: held[name] for name in self.trained}


def _matching(patterns: Sequence[str], source: Source) -> list[str]:
    names = list(dict.fromkeys(name for held in source.tensors.values() for name in held))
    dropped: list[str] = []
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(f"--drop {pattern} fits no tensor of {source.path}; they are named as {names[0]}")
        dropped += [name for name in found if name not in dropped]
    return dropped


def _essential(model: FlagDiTConfig) -> dict:
    """What two descriptions of one model have in common: the feed-forward width, however it came to be rounded."""
    sizes = model.to_dict() | {"n_kv_heads": model.kv_heads, "ffn_dim": model.ffn_dim}
    return {key: sizes[key] for key in sizes if key not in ("multiple_of", "ffn_dim_multiplier", "frames")}
