"""Pixels to latents and back: `identity`, or a frozen diffusers AutoencoderKL."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lumina.config.schema import VaeConfig
from lumina.encoders._hub import DTYPES, check_complete, reading


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

    def enable_tiling(self) -> None:
        """Large pictures in overlapping tiles: less memory, a little slower, faint differences where tiles meet.

        A tile has the side that the autoencoder's config calls `sample_size`; what is no larger is one tile.

        Raises:
            ValueError: where there is no network, so nothing to save.
        """
        raise ValueError(f"there is nothing to tile: the autoencoder is {self.describe()}, which has no network")

    def enable_slicing(self) -> None:
        """One picture at a time: less memory, and slower on a device that a picture does not fill.

        Raises:
            ValueError: where there is no network, so nothing to save.
        """
        raise ValueError(f"there is nothing to slice: the autoencoder is {self.describe()}, which has no network")

    def compute_on(self, device: torch.device) -> torch.nn.Module | None:
        """Take inputs to `device` from now on.

        Returns:
            The network, None where there is none: it stays where it is, and whoever calls this brings its weights.
        """
        self._device = device
        return None

    def decodes(self, channels: int) -> bool:
        """Whether latents of so many channels can be decoded."""
        return channels == self.latent_channels

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
        mean, deviation = self.moments(pixels)
        if noise is None:
            return mean
        if noise.shape != mean.shape:
            expected = tuple(mean.shape)
            raise ValueError(f"the noise for these pixels has the latents' shape {expected}, not {tuple(noise.shape)}")
        return mean + deviation * noise.to(self._device, torch.float32)

    def moments(
        self, pixels: Float[Tensor, "n pixel_channels height width"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """Mean and standard deviation of the scaled latents, float32.

        Raises:
            ValueError: for pixels of another shape, or sides that are not multiples of `factor`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != self.pixel_channels or not pixels.is_floating_point():
            raise ValueError(
                f"the autoencoder takes floating-point pixels (N, {self.pixel_channels}, H, W) in [-1, 1], "
                f"not {pixels.dtype} {tuple(pixels.shape)}"
            )
        self.latent_shape(pixels.shape[2], pixels.shape[3])
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            mean, deviation = self._posterior(pixels.to(self._device, self._dtype))
            mean = (mean.float() - self._shift) * self._scale
            return mean, torch.zeros_like(mean) + deviation * self._scale

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n pixel_channels height width"]:
        """Pixels, float32, clamped to [-1, 1], of scaled latents.

        Raises:
            ValueError: for latents with another number of channels.
        """
        if latents.ndim != 4 or not self.decodes(latents.shape[1]):
            raise ValueError(
                f"the autoencoder decodes latents (N, {self.latent_channels}, h, w), not {tuple(latents.shape)}"
            )
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            z = latents.to(self._device, torch.float32) / self._scale + self._shift
            return self._pixels(z.to(self._dtype)).float().clamp(-1.0, 1.0)


def build_vae(config: VaeConfig, in_channels: int, device: str | torch.device = "cpu") -> Vae:
    """The autoencoder `config.model` names: `identity`, `none`, or a diffusers AutoencoderKL by hub name or folder.

    `in_channels` are the diffusion model's, which the latents must have.

    Raises:
        ValueError: for a model that is missing, gated or unreadable, and for another number of latent channels.
    """
    if config.model == "identity":
        return IdentityVae(config, in_channels, device)
    if config.model == "none":
        return NoVae(config, in_channels, device)
    return DiffusersVae(config, in_channels, device)


class IdentityVae(Vae):
    """Latents are the pixels, of any number of channels (spectrograms have one); the posterior has no width.

    It encodes pixels of as many channels as the model has, and decodes latents of fewer as well.

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

    def decodes(self, channels: int) -> bool:
        return 1 <= channels <= self.latent_channels

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
        return pixels, 0.0

    def _pixels(self, latents: Tensor) -> Tensor:
        return latents


class NoVae(Vae):
    """In the place of an autoencoder where all latents were made beforehand: it knows sizes, and neither way."""

    def __init__(self, config: VaeConfig, in_channels: int, device: str | torch.device = "cpu"):
        self.factor, self.latent_channels, self.pixel_channels = config.factor, in_channels, 3
        self._device, self._dtype, self._scale, self._shift = torch.device(device), torch.float32, 1.0, 0.0

    def describe(self) -> str:
        return f"none (latents made beforehand, {self.factor} pixels each, {self.latent_channels} channels)"

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
        raise ValueError("vae.model=none takes latents made by `lumina data encode`, not pixels; name an autoencoder")

    def _pixels(self, latents: Tensor) -> Tensor:
        raise ValueError("vae.model=none makes no pictures of latents; name the autoencoder that made them")


# Scales of published autoencoders, by the last part of their name, for their configs lack or misstate them: a config
# without a scale is given Stable Diffusion's 0.18215 by diffusers, and keeps that when it is saved again.
_SD, _SDXL = 0.18215, 0.13025
_PUBLISHED = {
    "sd-vae-ft-ema": _SD,
    "sd-vae-ft-mse": _SD,
    "sd-vae-ft-ema-original": _SD,
    "sd-vae-ft-mse-original": _SD,
    "sdxl-vae": _SDXL,
    "sdxl-vae-fp16-fix": _SDXL,
}


class DiffusersVae(Vae):
    """A diffusers AutoencoderKL, frozen: its own folder, a pipeline folder with `vae/`, or a hub name.

    Scale and shift are the published model's where its name is known, else its config's `scaling_factor`,
    `shift_factor`, `latents_mean` and `latents_std`; `config.scale` and `config.shift` override them. SDXL's
    autoencoder overflows in 16-bit floats of 5 exponent bits (diffusers' `force_upcast`); bf16 has the range of
    fp32, so here it only loses precision.
    """

    def __init__(self, config: VaeConfig, in_channels: int, device: str | torch.device = "cpu"):
        import diffusers

        self._name = config.model
        self._device = torch.device(device)
        self._dtype = DTYPES[config.dtype]
        path, subfolder = _locate(config.model)
        with reading("vae.model", config.model, "diffusers AutoencoderKL", diffusers):
            settings = diffusers.AutoencoderKL.load_config(path, subfolder=subfolder)
        kind = settings.get("_class_name") or settings.get("model_type") or "unknown"
        if kind != "AutoencoderKL":
            raise ValueError(f"vae.model: {config.model} is of the kind {kind}; only a diffusers AutoencoderKL will do")
        latent_channels = settings.get("latent_channels", 4)
        if latent_channels != in_channels:
            raise ValueError(
                f"vae.model: {config.model} makes latents of {latent_channels} channels but the diffusion model takes "
                f"{in_channels}; set model.in_channels to {latent_channels} or choose another autoencoder"
            )
        self._scale, self._shift = self._scale_and_shift(config, settings)
        with reading("vae.model", config.model, "diffusers AutoencoderKL", diffusers):
            model, report = diffusers.AutoencoderKL.from_pretrained(
                path, subfolder=subfolder, torch_dtype=self._dtype, output_loading_info=True
            )
        check_complete("vae.model", config.model, report)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.latent_channels = latent_channels
        self.pixel_channels = model.config.in_channels

    def describe(self) -> str:
        scale = "one a channel" if isinstance(self._scale, Tensor) else f"{self._scale:g}"
        precision = str(self._dtype).removeprefix("torch.")
        return (
            f"{self._name} ({self.factor} pixels a latent, {self.latent_channels} latent channels, scale {scale}, "
            f"{precision})"
        )

    def enable_tiling(self) -> None:
        self._model.enable_tiling()

    def enable_slicing(self) -> None:
        self._model.enable_slicing()

    def compute_on(self, device: torch.device) -> torch.nn.Module | None:
        self._device = device
        self._scale, self._shift = (
            value.to(device) if isinstance(value, Tensor) else value for value in (self._scale, self._shift)
        )
        return self._model

    def _scale_and_shift(self, config: VaeConfig, settings: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        scale: float | Tensor | None = config.scale
        shift: float | Tensor | None = config.shift
        if scale is None:
            scale = _own_scale(config.model, settings)
            if settings.get("latents_std"):
                scale = scale / self._a_channel(settings["latents_std"])
        if shift is None:
            mean = settings.get("latents_mean")
            shift = self._a_channel(mean) if mean else settings.get("shift_factor") or 0.0
        return scale, shift

    def _a_channel(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self._device).view(-1, 1, 1)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
        posterior = self._model.encode(pixels).latent_dist
        return posterior.mean, posterior.std.float()

    def _pixels(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


def _locate(name: str) -> tuple[str, str | None]:
    """(folder or hub name, subfolder or None)."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, None
    inside = not (folder / "config.json").is_file() and (folder / "vae").is_dir()
    return str(folder), "vae" if inside else None


def _own_scale(name: str, settings: dict[str, Any]) -> float:
    """The scale of the model called `name` whose raw config.json is `settings`."""
    names = [_model_name(name), _model_name(str(settings.get("_name_or_path", "")))]
    for known in names:
        if known in _PUBLISHED:
            return _PUBLISHED[known]
    given = settings.get("scaling_factor")
    # 0.18215 in the config of an SDXL model is diffusers' default, saved: no SDXL autoencoder has that scale.
    if given in (None, _SD) and any("sdxl" in known or "stable-diffusion-xl" in known for known in names):
        return _SDXL
    if given is not None:
        return float(given)
    if settings.get("latent_channels", 4) != 4:
        raise ValueError(f"vae.scale: the config of {name} has no scaling_factor; give the scale of its latents")
    return _SD


def _model_name(name: str) -> str:
    """`sdxl-vae` of a hub name, of a folder called so, of its `vae/`, or of its place in the hub's cache."""
    parts = [part for part in Path(name).parts if part != "vae"]
    for part in parts:
        if part.startswith("models--"):
            return part.split("--")[-1].lower()
    return parts[-1].lower() if parts else ""
