"""One sample, whatever its medium."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lumina.data.decode import array, audio, image, video
from lumina.data.decode.errors import BadSampleError
from lumina.data.decode.geometry import View, clip_of, region_of
from lumina.data.decode.text import caption_of, encoders_of, label_of, parse_json

MEDIA = (*image.IMAGE_EXTENSIONS, *video.VIDEO_EXTENSIONS, *audio.AUDIO_EXTENSIONS, "latent.npy", "npy")
"""Members that are a sample's medium; a sample has exactly one, or a latent beside what that was made of."""


@dataclass
class Decoded:
    """`pixels` (frames, channels, height, width) float32 in [-1, 1]; `caption`, `label` None where there is none."""

    pixels: Float[Tensor, "f c h w"]
    caption: str | None
    label: int | None


@dataclass(frozen=True)
class Probe:
    """What an index knows of a sample without decoding it.

    Attributes:
        kind: "image", "video", "audio" or "latent".
        height: pixels as the picture is seen, rows of the latent; 0 for audio.
        width: likewise.
        frames: of the video or latent; 1 for pictures, 0 for audio.
        duration: seconds; 0 for pictures, latents, and videos without times (.npy).
    """

    kind: str
    height: int
    width: int
    frames: int
    duration: float


def probe(members: Mapping[str, bytes]) -> Probe:
    """What a sample is, from its headers; of a video all packets are counted and the first frame is decoded.

    Raises:
        BadSampleError: it has none of `MEDIA` or several, or its headers cannot be read.
        ValueError: the package that reads the medium is not installed; the message names the extra.
    """
    extension = _medium(members)
    data = members[extension]
    if extension in image.IMAGE_EXTENSIONS:
        return Probe("image", *image.seen_size(data), 1, 0.0)
    if extension in video.VIDEO_EXTENSIONS:
        size = video.video_size(data)
        return Probe("video", size.height, size.width, size.frames, size.duration)
    if extension in audio.AUDIO_EXTENSIONS:
        return Probe("audio", 0, 0, 0, audio.audio_duration(data))
    if extension == "latent.npy":
        _, frames, _, height, width = array.latent_array(data).shape
        return Probe("latent", height, width, frames, 0.0)
    frames, height, width, _ = array.pixel_array(data).shape
    return Probe("video" if array.is_video(data) else "image", height, width, frames, 0.0)


def decode_view(members: Mapping[str, bytes], view: View, channels: int) -> Decoded:
    """The view of a picture or video, with its caption and label: `view_levels` as pixels.

    Raises:
        BadSampleError, ValueError: as there; also for its .txt or .json.
    """
    return _decoded(members, view_levels(members, view, channels))


def view_levels(members: Mapping[str, bytes], view: View, channels: int) -> np.ndarray:
    """The view of a picture or video: (frames, height, width, channels), uint8 or, of 16-bit grey, float32 in 0 … 255.

    Pictures are turned as their EXIF says and videos as their display matrix says, transparent parts are laid on
    white, 16-bit grey keeps its precision. What is cut away is not scaled, and JPEGs that are much larger than the
    view are decoded at a part of their size.

    Args:
        members: extension without the dot → content.
        view: what is cut out.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        BadSampleError: the sample cannot be used, or is smaller or shorter than the view; the message says why.
        ValueError: `channels` is neither 1 nor 3; or a package is not installed.
    """
    _check_channels(channels)
    extension = _medium(members)
    data = members[extension]
    if extension in image.IMAGE_EXTENSIONS:
        clip_of(view, 1)
        levels = image.image_levels(data, view, channels)[None]
    elif extension in video.VIDEO_EXTENSIONS:
        levels = video.video_levels(data, view, channels)
    elif extension == "npy":
        levels = _array_levels(array.pixel_array(data), view, channels)
    else:
        raise BadSampleError(f".{extension} holds no pixels")
    return levels[:, :, ::-1] if view.flip else levels


def decode_audio(members: Mapping[str, bytes], sample_rate: int) -> tuple[np.ndarray, ...]:
    """The waveforms of a sample, one a sound file and so exactly one: float32 (samples,) in [-1, 1].

    It is the mean of the channels, resampled from its own rate to `sample_rate` a second.

    Raises:
        BadSampleError: the medium is not audio; or it is cut, damaged, empty or too long.
        ValueError: `sample_rate` is not of 1000 … 768000; or soundfile is not installed.
    """
    extension = _medium(members)
    if extension not in audio.AUDIO_EXTENSIONS:
        raise BadSampleError(f".{extension} is no audio; {', '.join(audio.AUDIO_EXTENSIONS)} are")
    return (audio.waveform_of(members[extension], sample_rate),)


def verify(members: Mapping[str, bytes]) -> None:
    """Decode all that a sample holds, pictures and videos at their own size, and keep nothing of it.

    Raises:
        BadSampleError: it could not be trained on.
        ValueError: the package that reads the medium is not installed; the message names the extra.
    """
    extension = _medium(members)
    data = members[extension]
    if extension in image.IMAGE_EXTENSIONS:
        image.image_levels(data, View(*image.seen_size(data), resize=False), channels=3)
    elif extension in video.VIDEO_EXTENSIONS:
        video.check_frames(data)
    elif extension in audio.AUDIO_EXTENSIONS:
        audio.waveform_of(data, sample_rate=None)
    elif extension == "latent.npy":
        array.load_latent(members)
    else:
        array.pixel_array(data)
    array.load_text_features(members)
    fields = parse_json(members)
    caption_of(members, fields)
    label_of(fields)
    encoders_of(fields)


def _medium(members: Mapping[str, bytes]) -> str:
    if "latent.npy" in members:
        return "latent.npy"
    found = [extension for extension in MEDIA if extension in members]
    if len(found) != 1:
        raise BadSampleError(f"a sample needs one medium of {', '.join(MEDIA)}; found {found or 'none'}")
    return found[0]


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"pictures decode to 1 or 3 channels, not {channels}")


def _array_levels(frames: np.ndarray, view: View, channels: int) -> np.ndarray:
    clip = clip_of(view, len(frames))
    top, left, rows, columns = region_of(view, *frames.shape[1:3])
    levels = np.empty((view.frames, view.height, view.width, channels), np.uint8)
    for slot, number in enumerate(clip):
        cut = np.array(frames[number, top : top + rows, left : left + columns])
        if channels == 1 and cut.shape[-1] == 3:
            cut = image.levels_of(Image.fromarray(cut), 1)
        levels[slot] = image.resample(cut, view.height, view.width)
    return levels


def _decoded(members: Mapping[str, bytes], levels: np.ndarray) -> Decoded:
    fields = parse_json(members)
    return Decoded(image.pixels_of(levels), caption_of(members, fields), label_of(fields))
