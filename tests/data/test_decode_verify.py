"""All of a sample is decoded: what its headers hide is found, in every medium, and what is good passes."""

import json

import numpy as np
import pytest

from lumina.data.check import check_shards
from lumina.data.decode import BadSampleError, View, decode_view, probe, verify
from lumina.data.decode import video as video_module
from lumina.data.write import write_shards
from tests.data.media import FRAMES, frames, npy, picture, video, wav

TEXT = {"txt": b"a caption", "json": b'{"label": 1, "encoders": {"vae": "x", "text": null}}'}
LATENT = np.random.default_rng(0).normal(size=(2, 1, 8, 4, 6)).astype(np.float16)
FEATURES = {"text.npy": npy(LATENT.reshape(12, -1)), "text.null.npy": npy(LATENT.reshape(12, -1)[:1])}
PICTURES = np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 48, 3), dtype=np.uint8)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3000).astype(np.float32)


@pytest.fixture(scope="module")
def good() -> dict[str, dict[str, bytes]]:
    return {
        "jpg": {"jpg": picture(40, 60, 90, "JPEG")},
        "webp": {"webp": picture(40, 60, 90, "WEBP")},
        "mp4": {"mp4": video(frames(FRAMES, 32, 48), g="8", crf="4")},
        "mov": {"mov": video(PICTURES, "mov", "mpeg4")},
        "wav": {"wav": wav(NOISE, 1234)},
        "film": {"npy": npy(frames(3, 8, 8))},
        "latent": {"latent.npy": npy(LATENT), **FEATURES},
        "latent-and-picture": {"latent.npy": npy(LATENT), "png": picture(8, 8, 1, "PNG")},
    }


def spoilt(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[-1] = np.nan
    return array


def holed(data: bytes) -> bytes:
    """Zeros in the middle, where the pixels are."""
    middle = len(data) // 2
    return data[:middle] + bytes(40) + data[middle + 40 :]


def test_what_is_good_passes(good) -> None:
    for members in good.values():
        verify(members | TEXT)
        verify(members)


def bad_ones(good) -> dict[str, tuple[dict[str, bytes], str]]:
    """Each has a good header, so that an index sees nothing."""
    latent = good["latent"]
    return {
        "jpg": ({"jpg": good["jpg"]["jpg"][:-40]}, "picture does not decode"),
        "mov": ({"mov": holed(good["mov"]["mov"])}, "video does not decode"),
        "wav": ({"wav": wav(spoilt(NOISE), 1234)}, "audio holds numbers that are not finite"),
        "latent": (latent | {"latent.npy": npy(spoilt(LATENT))}, "latent.npy holds numbers that are not finite"),
        "text": (latent | {"text.npy": npy(spoilt(LATENT.reshape(12, -1)))}, "text.npy holds numbers that are not"),
        "null": (latent | {"text.null.npy": npy(spoilt(LATENT.reshape(12, -1)))}, "text.null.npy holds numbers"),
        "no-null": ({key: latent[key] for key in ("latent.npy", "text.npy")}, "without those of the empty one"),
        "encoders": ({"json": b'{"encoders": ["x"], "label": 1}'}, '"encoders" in .json must be an object of names'),
        "label": ({"json": json.dumps({"label": 2**63}).encode()}, '"label" in .json must be a whole number'),
        "caption": ({"txt": b"\xff"}, "caption is not UTF-8"),
    }


def test_what_headers_hide_is_found(good) -> None:
    for members, reason in bad_ones(good).values():
        if not {"jpg", "mov", "wav", "latent.npy"} & set(members):
            members = good["film"] | members
        probe(members)
        with pytest.raises(BadSampleError, match=reason):
            verify(members)
    with pytest.raises(BadSampleError, match="needs one medium"):
        verify(TEXT)


def test_check_decodes_every_medium(good, tmp_path) -> None:
    bad = bad_ones(good)
    samples = [{"__key__": f"good-{name}", **TEXT, **members} for name, members in good.items()]
    samples += [{"__key__": f"bad-{name}", **TEXT, **good["film"], **bad[name][0]} for name in ("encoders", "caption")]
    samples += [
        {"__key__": f"bad-{name}", **TEXT, **bad[name][0]}
        for name in ("jpg", "mov", "wav", "latent", "text", "null", "no-null")
    ]
    samples.append({"__key__": "bad-sound", **TEXT, "wav": b"RIFF"})
    write_shards(tmp_path / "set", samples, name="a", samples_per_shard=100)

    def found(decode: bool) -> dict[str, tuple[str, ...]]:
        problems = check_shards([tmp_path / "set"], decode=decode, workers=1).problems
        return {problem.what: problem.named for problem in problems if "equal to" not in problem.what}

    captions = {"captions that are empty or do not read": ("bad-caption",)}
    assert found(False) == {"samples whose header does not read": ("bad-sound",)} | captions
    failed = found(True)
    named = failed.pop("samples that do not decode")
    assert failed == captions
    assert [name.partition(" (")[0] for name in named] == [sample["__key__"] for sample in samples[len(good) :]]


def test_videos_are_decoded_to_their_end_whatever_their_length(good, monkeypatch: pytest.MonkeyPatch) -> None:
    # No clip may be so long; a frame at a time it is no matter.
    monkeypatch.setattr(video_module, "MAX_CLIP_PIXELS", FRAMES * 32 * 48 - 1)
    cut = []
    monkeypatch.setattr(video_module, "_cut", lambda *of: cut.append(of[2]))
    verify(good["mp4"])
    assert cut == [(0, 0, 32, 48)] * FRAMES
    with pytest.raises(BadSampleError, match="pixels from the key frame before it to its end"):
        decode_view(good["mov"], View(8, 8, frames=FRAMES, start=1.0), 3)
