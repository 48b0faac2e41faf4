"""Pictures of fixed prompts during training, drawn with the averaged weights."""

from pathlib import Path

import torch
from torch import Tensor

from lumina.config.schema import Config
from lumina.flow.solver import SOLVERS
from lumina.inference.images import contact_sheet
from lumina.inference.pipeline import LuminaPipeline
from lumina.model.pretrained import build
from lumina.train.assemble import Parts


def check_preview(config: Config, parts: Parts) -> None:
    """Refuse before the run starts what would stop it at its first picture.

    Raises:
        ValueError: for an unknown solver, sides that do not fit, frames or prompts that the model does not take.
    """
    preview = config.preview
    if not preview.every:
        return
    if config.vae.model == "none" or (config.text is not None and config.text.encoder == "none"):
        raise ValueError(
            f"preview.every={preview.every}: pictures take the autoencoder and the text encoder; set it to 0, or name "
            "them in vae.model and text.encoder"
        )
    if preview.solver not in SOLVERS:
        raise ValueError(f"preview.solver is {preview.solver!r}; the solvers are {', '.join(SOLVERS)}")
    if preview.height % parts.multiple or preview.width % parts.multiple:
        raise ValueError(
            f"preview.height={preview.height} and preview.width={preview.width} must be multiples of {parts.multiple} "
            "pixels (autoencoder times patch size)"
        )
    if preview.frames > 1 and not parts.model.frames:
        raise ValueError(f"preview.frames={preview.frames}, but a model without model.frames=true draws one")
    if not parts.model.text_conditional:
        classes = [str(label) for label in range(parts.model.num_classes)]
        if unknown := [prompt for prompt in preview.prompts if prompt not in classes]:
            raise ValueError(
                f"preview.prompts has {unknown[0]!r}; of a label-conditional model prompts are classes, "
                f'as "0" to "{classes[-1]}"'
            )


def draw_preview(config: Config, parts: Parts, weights: dict[str, Tensor], step: int, device: torch.device) -> Path:
    """Write RUN/previews/step_NNNNNNNN.png: a row a prompt, the same noise at every step."""
    preview = config.preview
    model = build(parts.model, weights, "the averaged weights").to(device)
    pipeline = LuminaPipeline(model, parts.vae, parts.text, parts.objective)
    count = len(preview.prompts) * preview.per_prompt
    output = pipeline(
        preview.prompts,
        preview.height,
        preview.width,
        preview.frames,
        None if preview.solver in ("dopri5", "dopri8") else preview.steps,
        preview.guidance,
        [torch.Generator().manual_seed(seed) for seed in range(count)],
        num_images_per_prompt=preview.per_prompt,
        solver=preview.solver,
    )
    frames = [image for frames in output.frames for image in frames]
    path = Path(config.run.dir) / "previews" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    contact_sheet(frames, columns=preview.per_prompt * preview.frames).save(path)
    return path
