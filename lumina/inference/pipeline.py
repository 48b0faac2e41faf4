"""From prompts to pictures, in the manner of diffusers' pipelines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lumina.checkpoint.adapter import add_adapter, read_adapter
from lumina.config.schema import TextConfig, TrainedConfig, VaeConfig
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import Vae, build_vae
from lumina.flow.loss import Objective
from lumina.flow.sde import Constraint
from lumina.flow.solver import SDE_SOLVERS, sample
from lumina.inference.compose import Region
from lumina.inference.conditions import Conditions, label_conditions, text_conditions
from lumina.inference.extrapolate import ExtrapolationSettings, longest_trained, settings_for
from lumina.inference.guidance import DEFAULT_GUIDANCE, Guidance, network
from lumina.inference.images import to_images, to_pixels
from lumina.inference.memory import MemorySaving
from lumina.inference.opening import open_folder
from lumina.inference.style import Style, known_sample
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import save_pretrained
from lumina.model.tokens import token_count

DEFAULT_SIDE = 256
DEFAULT_STEPS = 50

Progress = Callable[[int, int, Tensor], object]


@dataclass(frozen=True)
class LuminaOutput:
    """`images`: the first frame of each sample; `frames`: all frames of each; `latents` (N, F, C, H, W)."""

    frames: list[list[Image.Image]]
    latents: Tensor

    @property
    def images(self) -> list[Image.Image]:
        return [frames[0] for frames in self.frames]


class LuminaPipeline(MemorySaving):
    """A trained Flag-DiT with the encoders and the flow it was trained with."""

    def __init__(
        self,
        model: FlagDiT,
        vae: Vae,
        text_encoder: TextEncoder | None,
        objective: Objective,
        settings: dict[str, Any] | None = None,
    ):
        """`settings`: the flow, text and vae sections that describe the other arguments, for `save_pretrained`.

        Its section `trained`, where there is one, gives `trained_length`.
        """
        if (text_encoder is None) == model.config.text_conditional:
            needs = "a text encoder" if model.config.text_conditional else "no text encoder"
            raise ValueError(f"this model is conditioned so that it needs {needs}")
        if text_encoder is not None and text_encoder.width != model.config.cap_feat_dim:
            raise ValueError(
                f"the text encoder's features are {text_encoder.width} wide, the model takes "
                f"cap_feat_dim={model.config.cap_feat_dim}; use the encoder it was trained with"
            )
        self.model, self.vae, self.text_encoder, self.objective = model.eval(), vae, text_encoder, objective
        self._settings = settings
        self._multiple = vae.factor * model.config.patch_size
        told = (settings or {}).get("trained")
        trained = None if told is None else TrainedConfig.model_validate(told)
        self.trained_length = longest_trained(trained, self._multiple, model.config.text_conditional)
        """Tokens of the longest samples trained on; None where that is not known."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: str = "ema",
        text: TextConfig | str | None = None,
        vae: VaeConfig | str | None = None,
    ) -> "LuminaPipeline":
        """Open a run (its newest checkpoint), a checkpoint, an inference folder or a public Lumina-T2I folder.

        Args:
            directory: the folder.
            device: where to sample; a GPU if there is one.
            dtype: of the model's weights; fp32 on a CPU and bf16 on a GPU by default.
            weights: "ema" or "model".
            text, vae: instead of the encoders the folder names; a name keeps the folder's other settings. A public
                folder names no text encoder.

        Raises:
            ValueError: for a folder that is none of these, or encoders that cannot be had.
        """
        directory = Path(directory)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if weights not in ("ema", "model"):
            raise ValueError(f"weights is {weights!r}; it is `ema` or `model`")
        model, flow, own_text, own_vae, trained = open_folder(directory, weights)
        if isinstance(text, str):
            text = (own_text or TextConfig()).model_copy(update={"encoder": text})
        if isinstance(vae, str):
            vae = own_vae.model_copy(update={"model": vae, "scale": None, "shift": None})
        text, vae = text or own_text, vae or own_vae
        settings = {"flow": flow.model_dump(), "vae": vae.model_dump()}
        if model.config.text_conditional:
            if text is None:
                raise ValueError(f"{directory} does not say which text encoder it was trained with; name one")
            settings["text"] = text.model_dump()
        if trained is not None:
            settings["trained"] = trained.model_dump()
        model = model.to(device, dtype)
        return cls(
            model,
            build_vae(vae, model.config.in_channels, device),
            build_text_encoder(text, device) if model.config.text_conditional else None,
            Objective.build(**flow.model_dump()),
            settings,
        )

    def load_lora(self, directory: str | Path, scale: float = 1.0) -> None:
        """Merge an adapter in peft's format into the weights; one after another adds up.

        Args:
            directory: holds `adapter_config.json` and `adapter_model.safetensors`.
            scale: times what the adapter adds; -1 takes it out again, but for rounding.

        Raises:
            ValueError: for a folder that is no adapter, is damaged, is more than plain LoRA or does not fit the model.
        """
        if not math.isfinite(scale):
            raise ValueError(f"the scale of an adapter is {scale}; it must be finite")
        add_adapter(self.model, read_adapter(Path(directory)), scale)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an inference folder: `config.json` (model, flow, text, vae, trained) and `model*.safetensors`."""
        if self._settings is None:
            raise ValueError("this pipeline was built from parts that do not say how to build them again")
        save_pretrained(self.model, Path(directory), extra=self._settings)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str] | Sequence[int],
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        channels: int | None = None,
        solver: str = "euler",
        time_shift: float | None = None,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        rope: str | None = None,
        rope_factor: float | None = None,
        rope_switch: float | None = None,
        proportional_attention: bool | None = None,
        trained_length: int | None = None,
        regions: Sequence[Region] = (),
        style: Style | None = None,
        latents: Tensor | None = None,
        start: float | None = None,
        constrain: Constraint | None = None,
        callback: Progress | None = None,
        **solver_options: Any,
    ) -> LuminaOutput:
        """Draw samples.

        Args:
            prompt: one or several captions; of a label-conditional model, class numbers.
            height, width: pixels, multiples of the autoencoder's factor times the patch size; 256 by default.
            num_frames: frames of a video, views of an object.
            num_inference_steps: of the solvers with fixed steps; 50 by default.
            guidance_scale: classifier-free guidance; 1 is none, 0 is unconditional.
            generator: torch's, on the CPU; with one for each sample a sample does not depend on its batch.
            negative_prompt: what guidance leads away from.
            num_images_per_prompt: samples of each prompt, next to each other in the result.
            channels: of samples that were padded in training, their own; the model sees zeros in the others, and
                pictures and `latents` are without them. The model's by default.
            solver, solver_options: see `lumina.flow.solver.sample`.
            guided_channels, guidance_interval: see `lumina.inference.guidance.Guidance`.
            rope, rope_factor, rope_switch, proportional_attention, trained_length, time_shift: see `extrapolation_for`.
            regions: captions of parts of the samples, which `prompt` is then the rest of (`lumina.inference.compose`).
            style: what the samples take their style from (`lumina.inference.style`).
            latents: (N, F, C, H, W), in place of noise that is drawn.
            start, constrain: see `lumina.flow.solver.sample`; with `start`, `latents` are what is there at that time.
            callback: called as callback(step, steps, x) after every step.

        Raises:
            ValueError: for sizes that the patch size does not divide, prompts that the model does not take, channels
                that cannot be decoded, options that the solver does not have, or settings that do not apply.
        """
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt to draw; give at least one")
        guidance = Guidance(guidance_scale, guided_channels, guidance_interval)
        if num_images_per_prompt < 1 or num_frames < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} and num_frames={num_frames} must be ≥ 1")
        if num_frames > 1 and not self.model.config.frames:
            raise ValueError(f"num_frames={num_frames}, but this model was built without frames; it draws one")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        height, width = (DEFAULT_SIDE if side is None else side for side in (height, width))
        channels = self._channels(channels)
        guidance.check_channels(channels)
        extrapolation = self.extrapolation_for(
            height,
            width,
            num_frames,
            rope=rope,
            rope_factor=rope_factor,
            rope_switch=rope_switch,
            proportional_attention=proportional_attention,
            trained_length=trained_length,
            time_shift=time_shift,
        )
        shape = (num_frames, channels, *self._latent_shape(num_frames, height, width)[2:])
        noise = self._noise(len(prompts), shape, generator) if latents is None else self._given(latents, prompts, shape)
        conditions = self._conditions(prompts, negative_prompt, shape, guidance.used, regions, style)
        known = None
        if style is not None and style.reference is not None:
            reference = self.encode([style.reference] * num_frames, height, width, channels)[None]
            own = torch.Generator().manual_seed(style.seed)
            known = known_sample(self.objective.path, reference, self._noise(1, shape, own))
        if num_inference_steps is None and solver not in ("dopri5", "dopri8"):
            num_inference_steps = DEFAULT_STEPS
        if solver in SDE_SOLVERS and generator is not None:
            solver_options["generator"] = generator
        latents = sample(
            network(self.model, conditions, guidance, extrapolation, known),
            noise,
            self.objective,
            solver=solver,
            steps=num_inference_steps,
            time_shift=extrapolation.time_shift,
            start=start,
            constrain=constrain,
            callback=callback,
            **solver_options,
        )
        pixels = self.vae.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return LuminaOutput([to_images(frames) for frames in pixels], latents)

    def extrapolation_for(
        self,
        height: int,
        width: int,
        num_frames: int = 1,
        *,
        rope: str | None = None,
        rope_factor: float | None = None,
        rope_switch: float | None = None,
        proportional_attention: bool | None = None,
        trained_length: int | None = None,
        time_shift: float | None = None,
    ) -> ExtrapolationSettings:
        """The settings that samples of a size are drawn with.

        What is None is chosen from the ratio of their length to the trained one (`lumina.inference.extrapolate`),
        which the pipeline knows (`trained_length`) or is told here, in tokens; where neither, the ratio counts as 1.

        Raises:
            ValueError: for sizes that the patch size does not divide, and settings that do not apply.
        """
        _, _, rows, columns = self._latent_shape(num_frames, height, width)
        config = self.model.config
        return settings_for(
            token_count(num_frames, rows, columns, config.patch_size, config.text_conditional),
            self.trained_length if trained_length is None else trained_length,
            rope=rope,
            rope_factor=rope_factor,
            rope_switch=rope_switch,
            proportional_attention=proportional_attention,
            time_shift=time_shift,
        )

    def _channels(self, channels: int | None) -> int:
        whole = self.model.config.in_channels
        if channels is None:
            return whole
        if channels not in (1, 3, whole) or channels > whole:
            raise ValueError(f"channels is {channels}; pictures have 1 or 3, and this model draws at most {whole}")
        if not self.vae.decodes(channels):
            raise ValueError(
                f"channels is {channels}, but the autoencoder decodes latents of {whole} only; leave it out, or decode "
                "with vae `identity`"
            )
        return channels

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        multiple = self._multiple
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"height {height} and width {width} must be multiples of {multiple} pixels "
                f"(autoencoder {self.vae.factor} × patch {self.model.config.patch_size})"
            )
        return (frames, *self.vae.latent_shape(height, width))

    def encode(
        self,
        frames: Sequence[Image.Image],
        height: int | None = None,
        width: int | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """Latents (F, C, H, W) of a picture, or of the frames of a video: the mode of the autoencoder's posterior.

        They are scaled until they cover height × width, their own size by default, and what stands over is cut off.

        Raises:
            ValueError: for frames of several sizes, and sizes that the patch size does not divide.
        """
        if not frames or len({frame.size for frame in frames}) > 1:
            raise ValueError("give at least one frame, and frames of one size")
        own_width, own_height = frames[0].size
        height, width = own_height if height is None else height, own_width if width is None else width
        self._latent_shape(len(frames), height, width)
        channels = self._channels(channels)
        # Autoencoders take RGB; the identity's pixels have the channels of the samples.
        pixels = to_pixels(frames, height, width, channels if self.vae.factor == 1 else 3)
        return self.vae.encode(pixels, None).to(next(self.model.parameters()).device)

    def _given(self, latents: Tensor, prompts: list, shape: tuple[int, int, int, int]) -> Tensor:
        if tuple(latents.shape) != (len(prompts), *shape):
            raise ValueError(
                f"latents are {tuple(latents.shape)}; {len(prompts)} samples of this size are "
                f"{(len(prompts), *shape)} (N, F, C, H, W)"
            )
        return latents.to(next(self.model.parameters()).device)

    def _noise(
        self, count: int, shape: tuple[int, int, int, int], generator: torch.Generator | Sequence | None
    ) -> Tensor:
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} samples; give one, or one for each")
            noise = torch.stack([torch.randn(shape, generator=each) for each in generator])
        else:
            noise = torch.randn((count, *shape), generator=generator)
        return noise.to(next(self.model.parameters()).device)

    def _conditions(
        self,
        prompts: list,
        negative_prompt: str,
        shape: tuple[int, int, int, int],
        guided: bool,
        regions: Sequence[Region],
        style: Style | None,
    ) -> Conditions:
        """Of the samples and, behind them, of the picture whose style they share."""
        known = style is not None and style.reference is not None
        leader = None if style is None else len(prompts) * known
        shape = (shape[0], self.model.config.in_channels, *shape[2:])
        if self.text_encoder is not None:
            return text_conditions(
                self.model,
                self.text_encoder,
                prompts + [style.prompt] * known if known else prompts,
                negative_prompt,
                shape,
                guided=guided,
                regions=regions,
                leader=leader,
                plain=int(known),
            )
        if negative_prompt:
            raise ValueError("a label-conditional model takes no negative_prompt")
        if regions:
            raise ValueError("a label-conditional model takes no regions: it has no captions to follow")
        known_class = [style.prompt or self.model.config.num_classes] if known else []
        return label_conditions(self.model, prompts + known_class, shape, guided=guided, leader=leader)
