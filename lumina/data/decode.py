"""From the members of one sample to pixels, caption and label."""

import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 89_478_485
"""Larger pictures are refused undecoded: the limit above which Pillow, too, suspects a decompression bomb."""

# What Pillow raises on damaged files. A programming error of ours is not in it and must come through.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class BadSampleError(ValueError):
    """One sample cannot be used; the loader puts another in its place. The message is the reason, in one line."""


@dataclass
class Decoded:
    """`pixels` (frames, channels, height, width) float32 in [-1, 1]; `caption`, `label` None where there is none."""

    pixels: Float[Tensor, "f c h w"]
    caption: str | None
    label: int | None


def cropped_size(height: np.ndarray | int, width: np.ndarray | int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Size in pixels that `decode` crops pictures to: multiples of `multiple`, no larger than the picture.

    Arrays or numbers. Both results are 0 where a side is shorter than `multiple` or unknown (0); `decode` refuses
    such pictures.
    """
    if multiple < 1:
        raise ValueError(f"pictures are cropped to multiples of at least 1 pixel, not {multiple}")
    height, width = np.asarray(height), np.asarray(width)
    fits = (height >= multiple) & (width >= multiple)
    return np.where(fits, height // multiple * multiple, 0), np.where(fits, width // multiple * multiple, 0)


def decode(members: Mapping[str, bytes], *, channels: int, multiple: int) -> Decoded:
    """Decode one sample.

    The picture (.jpg .jpeg .png .webp) is turned as its EXIF says, transparent parts are laid on white, 16-bit grey
    keeps its precision, and the middle is cut out at `cropped_size`. The caption is .txt (UTF-8, stripped), else
    "caption" of .json; the label is "label" of .json.

    Args:
        members: extension without the dot → content.
        channels: 1 (grey) or 3 (RGB).
        multiple: height and width are cropped to multiples of it, in pixels (VAE factor × patch size).

    Raises:
        BadSampleError: the sample cannot be used; the message says why.
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures decode to 1 or 3 channels, not {channels}")
    image = _load(_image_member(members))
    rows, columns = (int(side) for side in cropped_size(image.height, image.width, multiple))
    if rows == 0:
        raise BadSampleError(f"picture of {image.height}×{image.width} pixels is smaller than {multiple}×{multiple}")
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    pixels = _to_pixels(image.crop((left, top, left + columns, top + rows)), channels)
    fields = parse_json(members)
    return Decoded(pixels.unsqueeze(0), caption_of(members, fields), label_of(fields))


def image_size(members: Mapping[str, bytes]) -> tuple[int, int]:
    """(height, width) in pixels of the picture `decode` would give uncropped; `BadSampleError` if its header is bad."""
    data = _image_member(members)
    image = _open(data)
    # Pillow decodes a whole PNG to look for EXIF behind the pixels; most have none.
    if image.format == "PNG" and not re.search(b"eXIf|Raw profile type|XML:com.adobe.xmp", data):
        return image.height, image.width
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except _PILLOW_ERRORS as error:
        raise _unreadable(error) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def caption_of(members: Mapping[str, bytes], fields: Mapping[str, object]) -> str | None:
    """Caption of a sample, None if it has none; `fields` is its parsed .json."""
    if "txt" in members:
        try:
            caption = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSampleError(f"caption is not UTF-8 (byte {error.start})") from error
    else:
        caption = fields.get("caption")
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise BadSampleError(f'"caption" in .json must be text, not {type(caption).__name__}')
    if "\0" in caption:
        raise BadSampleError("caption holds zero bytes, as a hole in a file leaves them")
    return caption.strip()


def label_of(fields: Mapping[str, object]) -> int | None:
    """Class number of a sample, None if it has none; `fields` is its parsed .json."""
    label = fields.get("label")
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise BadSampleError(f'"label" in .json must be a whole number of at least 0, not {label!r}')
    return label


def parse_json(members: Mapping[str, bytes]) -> dict[str, object]:
    """The .json of a sample, empty if it has none; `BadSampleError` if it is not a JSON object."""
    if "json" not in members:
        return {}
    try:
        fields = json.loads(members["json"])
    except ValueError as error:
        raise BadSampleError(f".json does not parse ({error})") from error
    if not isinstance(fields, dict):
        raise BadSampleError(f".json must hold an object, not {type(fields).__name__}")
    return fields


def _image_member(members: Mapping[str, bytes]) -> bytes:
    found = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(found) != 1:
        raise BadSampleError(f"a sample needs one picture of {', '.join(IMAGE_EXTENSIONS)}; found {found or 'none'}")
    return members[found[0]]


def _open(data: bytes) -> Image.Image:
    """The picture with its header read and its pixels not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, where the sample is known
        try:
            # Named formats only: Pillow would hand a PostScript file to an interpreter.
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        except Image.DecompressionBombError as error:
            raise BadSampleError(f"picture is larger than {MAX_PIXELS} pixels") from error
        except _PILLOW_ERRORS as error:
            raise _unreadable(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSampleError(f"picture of {image.height}×{image.width} pixels is larger than {MAX_PIXELS} pixels")
    # A phone's JPEG may carry a second view (MPO); the first is the picture.
    if image.format in ("PNG", "WEBP") and image.n_frames > 1:
        raise BadSampleError(f"picture is an animation of {image.n_frames} frames")
    return image


def _load(data: bytes) -> Image.Image:
    image = _open(data)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _PILLOW_ERRORS as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> BadSampleError:
    first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return BadSampleError(f"picture does not decode ({re.sub(' <.*>', '', first_line)})")


def _to_pixels(image: Image.Image, channels: int) -> Float[Tensor, "c h w"]:
    """Any Pillow mode → float32 in [-1, 1]."""
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow would clip it to 8 bits instead of scaling it.
        grey = torch.from_numpy(np.asarray(image).astype(np.float32)).clamp_(0, 65535)
        return grey.div_(32767.5).sub_(1).repeat(channels, 1, 1)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    levels = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)
