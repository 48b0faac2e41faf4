"""Members stored as .npy: pixels, latents and text features, checked before they are believed."""

import io
import tokenize
import warnings
from collections.abc import Mapping

import numpy as np

from lumina.data.decode.errors import BadSampleError, unreadable
from lumina.data.decode.geometry import MAX_PIXELS

MAX_ARRAY_BYTES = 2**30
"""Larger latents and text features are refused."""

# What NumPy raises on a damaged header.
_NUMPY_ERRORS = (ValueError, SyntaxError, TypeError, EOFError, OverflowError, RecursionError, tokenize.TokenError)


def pixel_array(data: bytes) -> np.ndarray:
    """The pixels of .npy, uint8 (F, H, W, C) with C of 1 or 3; (H, W, C) is one frame. A read-only view of `data`.

    Raises:
        BadSampleError: it is something else, or damaged.
    """
    array = _array(data, ".npy")
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise BadSampleError(
            f".npy must hold uint8 pixels (H, W, C) or (F, H, W, C) with C of 1 or 3, not {array.dtype} {array.shape}"
        )
    frames = array if array.ndim == 4 else array[None]
    if frames.shape[1] * frames.shape[2] > MAX_PIXELS:
        raise BadSampleError(f".npy of {frames.shape[1]}×{frames.shape[2]} pixels is larger than {MAX_PIXELS} pixels")
    return frames


def is_video(data: bytes) -> bool:
    """Whether the pixels of .npy have an axis of frames; `BadSampleError` as in `pixel_array`."""
    pixel_array(data)
    return _array(data, ".npy").ndim == 4


def load_latent(members: Mapping[str, bytes]) -> np.ndarray:
    """ "latent.npy": latents (crops, F, C, H, W), float16 or float32 as stored, all finite.

    Raises:
        BadSampleError: there is none, or it is something else, damaged, or larger than `MAX_ARRAY_BYTES`.
    """
    if "latent.npy" not in members:
        raise BadSampleError("a sample of latents needs latent.npy")
    return _finite(latent_array(members["latent.npy"]), "latent.npy")


def latent_array(data: bytes) -> np.ndarray:
    """Like `load_latent`, its numbers not looked at; a read-only view of `data`."""
    return _floats(_array(data, "latent.npy"), "latent.npy", "(crops, F, C, H, W)")


def load_text_features(members: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """ "text.npy", "text.null.npy": features of the caption (L, width) and of the empty one (K, width); else None.

    They are float16 or float32 as stored, all finite.

    Raises:
        BadSampleError: one is something else, damaged, or larger than `MAX_ARRAY_BYTES`; the second is missing, or of
            another width.
    """
    if "text.npy" not in members:
        return None
    if "text.null.npy" not in members:
        raise BadSampleError("features of the caption (.text.npy) without those of the empty one (.text.null.npy)")
    caption, empty = (
        _finite(_floats(_array(members[name], name), name, "(L, width)"), name)
        for name in ("text.npy", "text.null.npy")
    )
    if caption.shape[1] != empty.shape[1]:
        raise BadSampleError(f"text.npy is {caption.shape[1]} wide and text.null.npy {empty.shape[1]}")
    return caption, empty


def _array(data: bytes, name: str) -> np.ndarray:
    """A read-only view of the numbers in `data`; nothing is unpickled and nothing allocated."""
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers by Python 2
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise BadSampleError(f"{name} has format version {version[0]}.{version[1]}; 1.0 and 2.0 are read")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(stream)
    except BadSampleError:
        raise
    except _NUMPY_ERRORS as error:
        raise unreadable(name, error) from error
    if dtype.kind not in "fiub":
        raise BadSampleError(f"{name} must hold plain numbers, not {str(dtype)[:40]}")
    count, there = 1, len(data) - stream.tell()
    for length in shape:
        count *= length
    if any(length < 0 for length in shape) or count * dtype.itemsize != there:
        raise BadSampleError(f"{name} promises {dtype} {shape} and holds {there} bytes of numbers")
    array = np.frombuffer(data, dtype, count, stream.tell()) if count else np.empty(0, dtype)
    return array.reshape(shape, order="F" if by_columns else "C")


def _floats(array: np.ndarray, name: str, axes: str) -> np.ndarray:
    half_or_single = array.dtype.kind == "f" and array.dtype.itemsize in (2, 4)
    if not half_or_single or array.ndim != axes.count(",") + 1 or 0 in array.shape:
        raise BadSampleError(f"{name} must hold float16 or float32 {axes}, not {array.dtype} {array.shape}")
    if array.nbytes > MAX_ARRAY_BYTES:
        raise BadSampleError(f"{name} of {array.nbytes} bytes is larger than {MAX_ARRAY_BYTES}")
    return array


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise BadSampleError(f"{name} holds numbers that are not finite")
    return np.array(array, array.dtype.newbyteorder("="), order="C")
