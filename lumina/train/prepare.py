"""From decoded samples to what a training step takes: latents, noise, times and conditions of one pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lumina.encoders.text import TextEncoder
from lumina.encoders.vae import Vae
from lumina.flow.loss import Objective, per_sample_mean
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import Captions, Layout, layout_of, pack
from lumina.parallel.mesh import Mesh
from lumina.parallel.randomness import Randomness
from lumina.parallel.sequence import Stretch, stretch_of


@runtime_checkable  # or the shape checks of the tests cannot look at it
class TrainingSample(Protocol):
    """What is needed of a loader's sample."""

    sample_id: int
    epoch: int
    occurrence: int
    key: str
    pixels: Tensor | None
    caption: str | None
    label: int | None
    latent: Tensor | None
    text: Tensor | None
    null_text: Tensor | None
    encoders: dict[str, str | None]


class Identity(NamedTuple):
    """All that random draws need of a sample."""

    sample_id: int
    epoch: int
    occurrence: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as the encoders leave them, whole: the same for all ranks that work on them."""

    identities: tuple[Identity, ...]
    latents: list[Tensor]  # (F, C, H, W) each
    captions: Captions | None
    labels: Int[Tensor, "n"] | None
    channels: tuple[int, ...] | None = None  # of each sample, its first ones, the others being padding; None: all


@dataclass(frozen=True, eq=False)
class TrainingPack:
    """One forward pass: this rank's tokens t of a pack, and what conditions its samples n, whole on every rank."""

    data: Float[Tensor, "t p"]
    noise: Float[Tensor, "t p"]
    t: Float[Tensor, "n"]
    layout: Layout  # of the whole pack
    stretch: Stretch
    captions: Captions | None
    labels: Int[Tensor, "n"] | None
    channels: tuple[int, ...] | None = None  # as in `Encoded`

    @property
    def t_of_token(self) -> Float[Tensor, "t"]:
        """The time of the sample each token belongs to."""
        return self.t[self.stretch.tokens.sample_id_t]

    def per_sample(self, errors: Float[Tensor, "t p"]) -> Float[Tensor, "n"]:
        """Each sample's mean over its patches: this rank's share, which sums to the mean over those that share it.

        Padded channels do not count.
        """
        tokens = self.stretch.tokens
        held = torch.tensor(tokens.attention.query_lengths, device=errors.device)
        patches = torch.tensor(tokens.patch_counts, device=errors.device)
        width = None
        if self.channels is not None:
            # A patch lies as (C, p, p), so that the channels of a sample come first.
            width = torch.tensor(self.channels, device=errors.device) * tokens.patch_size**2
        return per_sample_mean(errors, tokens.is_patch_t, held, patches, width)


class Preparer:
    """Encodes samples and draws what is random about them, each draw from the sample's identity alone."""

    def __init__(
        self,
        model: FlagDiTConfig,
        vae: Vae,
        text: TextEncoder | None,
        objective: Objective,
        randomness: Randomness,
        caption_dropout: float,
        mesh: Mesh,
        pad_channels: bool = False,
    ):
        """`pad_channels`: latents may have fewer channels than the model, and zeros fill them up."""
        self._pad_channels = pad_channels
        self._model, self._vae, self._text = model, vae, text
        self._objective, self._randomness = objective, randomness
        self._caption_dropout, self._mesh, self._device = caption_dropout, mesh, mesh.device

    def __call__(self, samples: Sequence[TrainingSample]) -> TrainingPack:
        """`encode`, then `pack`."""
        return self.pack(self.encode(samples))

    def encode(self, samples: Sequence[TrainingSample]) -> Encoded:
        """
        Raises:
            ValueError: for a sample without the caption or label that the model is conditioned on, by key.
        """
        captions, labels = self._conditions(samples)
        identities = tuple(Identity(sample.sample_id, sample.epoch, sample.occurrence) for sample in samples)
        latents = [self._latents(sample) for sample in samples]
        whole = self._model.in_channels
        channels = tuple(latent.shape[1] for latent in latents)
        if all(count == whole for count in channels):
            return Encoded(identities, latents, captions, labels)
        return Encoded(identities, [_padded(latent, whole) for latent in latents], captions, labels, channels)

    def pack(self, encoded: Encoded) -> TrainingPack:
        """This rank's part of a forward pass over these samples."""
        samples, latents = encoded.identities, encoded.latents
        shapes = [tuple(latent.shape) for latent in latents]
        noise = [
            # Drawn without the padding: a sample's noise does not depend on the model's channels.
            _padded(self._randomness.normal("noise", sample, (frames, real, height, width)), whole)
            for sample, real, (frames, whole, height, width) in zip(
                samples, encoded.channels or [shape[1] for shape in shapes], shapes, strict=True
            )
        ]
        u = torch.tensor([self._randomness.uniform("time", sample) for sample in samples], dtype=torch.float64)
        # The middle of the draw's last bit: a law that is infinite at 0 is never asked for it.
        t = self._objective.draw_times(u.clamp_min(2.0**-54)).to(self._device, torch.float32)
        layout = layout_of(shapes, self._model.patch_size, self._model.text_conditional, self._device)
        stretch = stretch_of(layout, self._mesh)
        noise = pack([values.to(self._device) for values in noise], layout)
        return TrainingPack(
            data=pack(latents, layout)[stretch.start : stretch.stop],
            noise=noise[stretch.start : stretch.stop],
            t=t,
            layout=layout,
            stretch=stretch,
            captions=encoded.captions,
            labels=encoded.labels,
            channels=encoded.channels,
        )

    def _latents(self, sample: TrainingSample) -> Float[Tensor, "f c h w"]:
        if sample.latent is not None:
            return self._drawn_from(sample, sample.latent)
        pixels = sample.pixels.to(self._device)
        shape = (len(pixels), *self._vae.latent_shape(*pixels.shape[-2:]))
        noise = None
        if self._vae.factor > 1:  # pixels themselves have no posterior to draw from
            noise = self._randomness.normal("posterior", sample, shape).to(self._device)
        return self._vae.encode(pixels, noise)

    def _drawn_from(self, sample: TrainingSample, moments: Tensor) -> Float[Tensor, "f c h w"]:
        """Latents out of the posterior that was encoded beforehand."""
        _same_encoder(sample, "vae", self._vae.describe())
        mean, deviation = moments.to(self._device, torch.float32).chunk(2, dim=1)
        channels, whole = mean.shape[1], self._vae.latent_channels
        if channels > whole or (channels < whole and not self._pad_channels):
            fill = "; data.pad_channels=true fills them up" if channels < whole else ""
            raise ValueError(
                f"sample {sample.key} holds latents of {channels} channels; model.in_channels={whole}{fill}"
            )
        if self._vae.factor == 1:
            return mean
        return mean + deviation * self._randomness.normal("posterior", sample, tuple(mean.shape)).to(self._device)

    def _conditions(self, samples: Sequence[TrainingSample]) -> tuple[Captions | None, Int[Tensor, "n"] | None]:
        dropped = [self._randomness.uniform("caption dropout", sample) < self._caption_dropout for sample in samples]
        if self._text is not None:
            features = self._features(samples, dropped)
            return Captions.of(torch.cat(features), tuple(map(len, features))), None
        none = self._model.num_classes
        labels = [none if drop else self._label(sample) for sample, drop in zip(samples, dropped, strict=True)]
        return None, torch.tensor(labels, device=self._device)

    def _features(self, samples: Sequence[TrainingSample], dropped: Sequence[bool]) -> list[Tensor]:
        """Of each sample's caption, or of the empty one where it is dropped: made beforehand, or now."""
        features: dict[int, Tensor] = {}
        captions: dict[int, str] = {}
        for i, (sample, drop) in enumerate(zip(samples, dropped, strict=True)):
            if sample.text is None:
                captions[i] = "" if drop else _required(sample, sample.caption, "caption")
                continue
            _same_encoder(sample, "text", self._text.describe())
            features[i] = (sample.null_text if drop else sample.text).to(self._device, torch.float32)
            width = features[i].shape[1]
            if width != self._text.width:
                raise ValueError(f"sample {sample.key} holds features {width} wide, not {self._text.width}")
        if captions:
            padded, mask = (x.to(self._device) for x in self._text(list(captions.values())))
            features |= {i: of[here.bool()] for i, of, here in zip(captions, padded, mask, strict=True)}
        return [features[i] for i in range(len(samples))]

    def _label(self, sample: TrainingSample) -> int:
        label = _required(sample, sample.label, "label")
        if not 0 <= label < self._model.num_classes:
            raise ValueError(
                f"sample {sample.key} has label {label}; model.num_classes={self._model.num_classes} allows "
                f"0 to {self._model.num_classes - 1}"
            )
        return label


def _padded(latent: Float[Tensor, "f c h w"], channels: int) -> Float[Tensor, "f c2 h w"]:
    """With channels of zeros behind its own."""
    return torch.nn.functional.pad(latent, (0, 0, 0, 0, 0, channels - latent.shape[1]))


def _same_encoder(sample: TrainingSample, which: str, ours: str) -> None:
    """Refuse what another encoder made; "none" takes what there is."""
    theirs = sample.encoders.get(which)
    if not ours.startswith("none") and theirs is not None and theirs != ours:
        raise ValueError(
            f"sample {sample.key} was encoded with {theirs}, but the run's {which} is {ours}; name that one, or encode "
            "the data again"
        )


def _required(sample: TrainingSample, value, what: str):
    if value is None:
        member = "a .txt member" if what == "caption" else 'a "label" in its .json member'
        raise ValueError(f"sample {sample.key} has no {what}, on which the model is conditioned; give it {member}")
    return value
