"""Pictures and films that users give, as upright 8-bit frames."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# Named formats only: Pillow would hand a PostScript file to an interpreter.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MOVING = ("PNG", "WEBP", "GIF")
# What Pillow raises on damaged files.
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
    Image.DecompressionBombError,
)


def read_frames(path: str | Path) -> list[Image.Image]:
    """The frames of a file or folder, as `plain` makes them.

    A picture has one, an animated PNG, GIF or WebP and a film (MP4 and others, by PyAV) all of theirs; of a folder each
    file is one or several, in the order of their names.

    Raises:
        ValueError: for what is not there, cannot be read or is no picture, and for films without PyAV.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        if not inside:
            raise ValueError(f"{path} is a folder without pictures")
        return [frame for each in inside for frame in _read_file(each)]
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    return _read_file(path)


def plain(image: Image.Image) -> Image.Image:
    """The picture upright, as its EXIF orientation says, in 8 bits, grey (`L`) or `RGB`.

    What is transparent is laid on white, as in training. 16-bit grey levels are divided by 257.

    Raises:
        ValueError: for pixels that have no range to bring to 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a picture has floating-point pixels; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"a picture has grey levels from {levels.min()} to {levels.max()}; save it with 8 or 16 bits a channel"
            )
        return Image.fromarray(np.round(levels / 257).astype(np.uint8))
    grey = image.mode in ("L", "LA", "La", "1")
    if transparent(image):
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), over)
    return image.convert("L" if grey else "RGB")


def transparent(image: Image.Image) -> bool:
    """Whether any of its pixels is, in part or whole."""
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _read_file(path: Path) -> list[Image.Image]:
    if path.suffix.lower() in _FILMS:
        return _read_film(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # Other formats keep thumbnails, pages or a second view behind the picture.
            count = getattr(image, "n_frames", 1) if image.format in _MOVING else 1
            frames = []
            for number in range(count):
                image.seek(number)
                frames.append(plain(image.copy()))
            return frames
    except Image.UnidentifiedImageError as error:
        names = ", ".join(_FORMATS)
        raise ValueError(f"{path} is no picture that can be read; these formats are: {names}, and films") from error
    except _PILLOW_ERRORS as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _read_film(path: Path) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: films are read by PyAV: pip install 'lumina-t2x[video]'") from error
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"{path} cannot be read as a film: {reason}") from error
    if not frames:
        raise ValueError(f"{path} is a film without frames")
    return frames
