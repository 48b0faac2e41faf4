"""Pixels as PIL images, and those on a contact sheet."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

SMALLEST_CELL = 64


def to_images(pixels: Float[Tensor, "f c h w"]) -> list[Image.Image]:
    """Frames in [-1, 1] of one channel (grey) or three (RGB) as 8-bit images.

    Raises:
        ValueError: for another number of channels.
    """
    channels = pixels.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"{channels} channels are no picture; pictures have 1 or 3 (is vae.model the right one?)")
    grey_or_rgb = ((pixels.float().cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(frame[0] if channels == 1 else frame.transpose(1, 2, 0)) for frame in grey_or_rgb]


def to_pixels(frames: Sequence[Image.Image], height: int, width: int, channels: int) -> Float[Tensor, "f c h w"]:
    """Frames as values in [-1, 1], grey (1 channel) or RGB (3), cut to the aspect and scaled to height × width."""
    fitted = [ImageOps.fit(frame.convert("L" if channels == 1 else "RGB"), (width, height)) for frame in frames]
    values = np.stack([np.asarray(frame, dtype=np.float32) for frame in fitted]).reshape(-1, height, width, channels)
    return torch.from_numpy(values / 127.5 - 1).permute(0, 3, 1, 2)


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images on a grid, row by row, with small ones magnified by a whole number; all of one size."""
    width, height = images[0].size
    scale = max(1, -(-SMALLEST_CELL // min(width, height)))
    gap = 4
    cell_w, cell_h = width * scale + gap, height * scale + gap
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * cell_w + gap, rows * cell_h + gap), "white")
    for i, image in enumerate(images):
        magnified = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(magnified, (gap + i % columns * cell_w, gap + i // columns * cell_h))
    return sheet
