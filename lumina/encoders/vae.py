"""Pixels to latents and back: `identity`, or a frozen diffusers AutoencoderKL."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.config.schema import VaeConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Vae(ABC):
    """A frozen map between pixels and latents; what every autoencoder offers.

    Attributes:
        factor: pixels along one side of a latent.
        latent_channels: channels of a latent.
        pixel_channels: channels of a pixel.
    """

    factor: int
    latent_channels: int
    pixel_channels: int
    _device: torch.device
    _dtype: torch.dtype
    # Broadcast over (N, C, H, W): numbers, or (C, 1, 1) where a model normalises each channel.
    _scale: float | Tensor
    _shift: float | Tensor

    @abstractmethod
    def describe(self) -> str:
        """One line for people: which autoencoder, its factor, channels, scale and precision."""

    @abstractmethod
    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
        """Mean and standard deviation of the latents, before shift and scale."""

    @abstractmethod
    def _pixels(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents."""

    def enable_memory_saving(self) -> None:
        """Trade a little time for memory on large or many images; a no-op where there is nothing to save."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of an image of `height` × `width` pixels.

        Raises:
            ValueError: where a side is not a positive multiple of `factor`.
        """
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(
                f"the autoencoder takes sides that are multiples of {self.factor} pixels, not {height} × {width}"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def encode(
        self, pixels: Float[Tensor, "n pixel_channels height width"], noise: Float[Tensor, "n c h w"] | None
    ) -> Float[Tensor, "n c h w"]:
        """Scaled latents, float32, of pixels in [-1, 1].

        `noise` is the posterior's standard normal draw, in the latents' shape; it comes from outside so that a sample
        draws the same under any layout. None takes the posterior's mode. Latents are (z - shift) * scale.

        Raises:
            ValueError: for pixels or noise of another shape, or sides that are not multiples of `factor`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != self.pixel_channels or not pixels.is_floating_point():
            raise ValueError(
                f"the autoencoder takes floating-point pixels (N, {self.pixel_channels}, H, W) in [-1, 1], "
                f"not {pixels.dtype} {tuple(pixels.shape)}"
            )
        expected = (pixels.shape[0], *self.latent_shape(pixels.shape[2], pixels.shape[3]))
        if noise is not None and tuple(noise.shape) != expected:
            raise ValueError(f"the noise for these pixels has the latents' shape {expected}, not {tuple(noise.shape)}")
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            mean, std = self._posterior(pixels.to(self._device, self._dtype))
            z = mean.float()
            if noise is not None:
                z = z + std * noise.to(self._device, torch.float32)
            return (z - self._shift) * self._scale

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n pixel_channels height width"]:
        """Pixels, float32, clamped to [-1, 1], of scaled latents.

        Raises:
            ValueError: for latents with another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"the autoencoder decodes latents (N, {self.latent_channels}, h, w), not {tuple(latents.shape)}"
            )
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            z = latents.to(self._device, torch.float32) / self._scale + self._shift
            return self._pixels(z.to(self._dtype)).float().clamp(-1.0, 1.0)


def build_vae(config: VaeConfig, in_channels: int, device: str | torch.device = "cpu") -> Vae:
    """The autoencoder `config.model` names: `identity`, or a diffusers AutoencoderKL by hub name or folder.

    `in_channels` are the diffusion model's, which the latents must have.

    Raises:
        ValueError: for a model that is missing, gated or unreadable, for another number of latent channels, and for a
            scale that is not a positive number.
    """
    if config.scale is not None and not (math.isfinite(config.scale) and config.scale > 0):
        raise ValueError(f"vae.scale: latents are multiplied by it, so a positive number, not {config.scale}")
    if config.shift is not None and not math.isfinite(config.shift):
        raise ValueError(f"vae.shift: a finite number, not {config.shift}")
    if config.model == "identity":
        return IdentityVae(config, in_channels, device)
    raise ValueError(f"vae.model: {config.model!r} is not known")


class IdentityVae(Vae):
    """Latents are the pixels, of any number of channels (spectrograms have one); the posterior has no width.

    `scale` and `shift`, 1 and 0 unless given, are applied as for any autoencoder.
    """

    def __init__(self, config: VaeConfig, in_channels: int, device: str | torch.device = "cpu"):
        self.factor = 1
        self.latent_channels = self.pixel_channels = in_channels
        self._device = torch.device(device)
        self._dtype = DTYPES[config.dtype]
        self._scale = 1.0 if config.scale is None else config.scale
        self._shift = 0.0 if config.shift is None else config.shift

    def describe(self) -> str:
        return f"identity (latents are the {self.pixel_channels}-channel pixels), scale {self._scale:g}"

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
        return pixels, 0.0

    def _pixels(self, latents: Tensor) -> Tensor:
        return latents
