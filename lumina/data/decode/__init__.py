"""From the members of one sample to pixels, waveform, latents, caption and label."""

from lumina.data.decode.array import load_latent, load_text_features
from lumina.data.decode.audio import AUDIO_EXTENSIONS
from lumina.data.decode.errors import BadSampleError
from lumina.data.decode.geometry import MAX_PIXELS, View
from lumina.data.decode.image import IMAGE_EXTENSIONS, pixels_of
from lumina.data.decode.sample import (
    MEDIA,
    Decoded,
    Probe,
    decode_audio,
    decode_view,
    probe,
    verify,
    view_levels,
)
from lumina.data.decode.text import caption_of, encoders_of, label_of, parse_json
from lumina.data.decode.video import VIDEO_EXTENSIONS

__all__ = [
    "AUDIO_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "MEDIA",
    "VIDEO_EXTENSIONS",
    "BadSampleError",
    "Decoded",
    "Probe",
    "View",
    "caption_of",
    "decode_audio",
    "decode_view",
    "encoders_of",
    "label_of",
    "load_latent",
    "load_text_features",
    "parse_json",
    "pixels_of",
    "probe",
    "verify",
    "view_levels",
]
