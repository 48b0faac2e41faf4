"""A few small files of every medium, whose content is known."""

import io

import av
import numpy as np
import soundfile
from PIL import Image

FRAMES, RATE = 20, 10


def grey(number: int) -> int:
    """The level of frame `number` of every video here."""
    return 20 + 10 * number


def frames(count: int, height: int, width: int) -> np.ndarray:
    """uint8 (count, height, width, 3)."""
    levels = np.array([grey(number) for number in range(count)], np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def npy(array: np.ndarray) -> bytes:
    """As NumPy stores it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def video(levels: np.ndarray, form: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """uint8 (frames, height, width, 3), RATE a second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as file:
        track = file.add_stream(codec, rate=RATE, options=options)
        track.height, track.width, track.pix_fmt = *levels.shape[1:3], "yuv420p"
        for frame in levels:
            file.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    """Samples stored as floats."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def picture(height: int, width: int, level: int, form: str) -> bytes:
    """A picture of one level of grey."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (level,) * 3).save(stream, form, quality=95)
    return stream.getvalue()
