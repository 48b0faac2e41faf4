"""Pictures: headers, and the pixels of a view without decoding more than it needs."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lumina.data.decode.errors import BadSampleError, unreadable
from lumina.data.decode.geometry import MAX_PIXELS, Turn, View, region_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# What Pillow raises on damaged files. A programming error of ours is not in it and must come through.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)

# EXIF 2.3, tag 0x0112.
_TURNS = {
    2: Turn(mirror_columns=True),
    3: Turn(mirror_columns=True, mirror_rows=True),
    4: Turn(mirror_rows=True),
    5: Turn(swap=True),
    6: Turn(mirror_rows=True, swap=True),
    7: Turn(mirror_columns=True, mirror_rows=True, swap=True),
    8: Turn(mirror_columns=True, swap=True),
}

_REDUCTIONS = ((8, 12.0), (4, 5.2), (2, 2.5))
"""A JPEG is decoded at 1/8, 1/4 or 1/2 where a pixel of the view is made of at least so many of the picture, a side.

Photographs then have a PSNR of at least 40 dB against what the whole of them gives; from 8, 4 and 2 on, 33 dB.
"""


def open_image(data: bytes) -> Image.Image:
    """The picture with its header read and its pixels not; `BadSampleError` where it is none, too large or animated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, where the sample is known
        try:
            # Named formats only: Pillow would hand a PostScript file to an interpreter.
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        except Image.DecompressionBombError as error:
            raise BadSampleError(f"picture is larger than {MAX_PIXELS} pixels") from error
        except _PILLOW_ERRORS as error:
            raise unreadable("picture", error) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSampleError(f"picture of {image.height}×{image.width} pixels is larger than {MAX_PIXELS} pixels")
    # A phone's JPEG may carry a second view (MPO); the first is the picture.
    if image.format in ("PNG", "WEBP") and image.n_frames > 1:
        raise BadSampleError(f"picture is an animation of {image.n_frames} frames")
    return image


def seen_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture as it is seen, from its header; `BadSampleError` if that is bad."""
    image = open_image(data)
    # Pillow decodes a whole PNG to look for EXIF behind the pixels; most have none.
    if image.format == "PNG" and not re.search(b"eXIf|Raw profile type|XML:com.adobe.xmp", data):
        return image.height, image.width
    return _turn_of(image).size(image.height, image.width)


def image_levels(data: bytes, view: View, channels: int) -> np.ndarray:
    """The view (height, width, channels) of a picture: uint8, or float32 in 0 … 255 from 16-bit grey."""
    image = open_image(data)
    turn = _turn_of(image)
    region = region_of(view, *turn.size(image.height, image.width))
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        scale = min(region.rows / view.height, region.columns / view.width)
        reduction = next((part for part, least in _REDUCTIONS if scale >= least), 1)
        # libjpeg then leaves out what will not be seen: colour, and the high frequencies of every block.
        width, height = width // reduction, height // reduction  # an incomplete last row or column is left out
        image.draft("L" if channels == 1 else None, (width, height))
        region = region_of(view, *turn.size(height, width))
    top, left, rows, columns = turn.stored(region, height, width)
    try:
        image.load()
        if (columns, rows) != image.size:
            image = image.crop((left, top, left + columns, top + rows))
        levels = resample(levels_of(image, channels), *turn.size(view.height, view.width))
    except _PILLOW_ERRORS as error:
        raise unreadable("picture", error) from error
    return np.broadcast_to(turn.apply(levels), (view.height, view.width, channels))


def resample(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Levels (rows, columns, channels), uint8 or float32 in 0 … 255, scaled by an antialiased bicubic filter."""
    if levels.shape[:2] == (height, width):
        return levels
    # torch's filter for uint8 is Pillow's, several times as fast.
    planes = torch.from_numpy(levels).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return scaled if scaled.dtype == np.uint8 else scaled.clip(0, 255)


def pixels_of(levels: np.ndarray) -> Float[Tensor, "f c h w"]:
    """Levels 0 … 255 (frames, height, width, channels) → float32 in [-1, 1]; the only copy of what is kept."""
    planes = np.array(np.moveaxis(levels, -1, 1), np.float32, order="C")
    return torch.from_numpy(planes).div_(127.5).sub_(1)


def _turn_of(image: Image.Image) -> Turn:
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1), Turn())
    except _PILLOW_ERRORS as error:
        raise unreadable("picture", error) from error


def levels_of(image: Image.Image, channels: int) -> np.ndarray:
    """A loaded picture of any mode → (height, width, 1 or `channels`); a copy."""
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow would clip it to 8 bits instead of scaling it.
        return (np.asarray(image).astype(np.float32).clip(0, 65535) / np.float32(257))[..., None]
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    if image.mode == "1" or channels == 1:
        image = image.convert("L")
    elif image.mode != "L":
        image = image.convert("RGB")
    return np.array(image).reshape(image.height, image.width, -1)
