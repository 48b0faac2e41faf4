"""Views of pictures and .npy pixels, against Pillow's own scaling of the whole picture."""

import io

import numpy as np
import pytest
from PIL import Image

from lumina.data.decode import BadSampleError, Probe, View, decode_view, probe
from lumina.data.decode.geometry import MAX_VIEW_PIXELS, clip_of, position, region_of


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shapes with edges, textures and shades of every size: harder to scale than most photographs."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for octave in range(2, 8):
        noise = rng.uniform(-1, 1, (2**octave, 2**octave, 3)).astype(np.float32)
        planes = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        picture += np.stack([np.asarray(plane) for plane in planes], -1) / octave
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        row, column, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.2) * height
        picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += rng.uniform(-0.7, 0.7, 3)
    return Image.fromarray(((np.tanh(picture) + 1) * 127.5).astype(np.uint8))


def stored(image: Image.Image, form: str = "PNG", **options: object) -> dict[str, bytes]:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return {{"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[form]: stream.getvalue()}


def npy(array: np.ndarray) -> dict[str, bytes]:
    stream = io.BytesIO()
    np.save(stream, array)
    return {"npy": stream.getvalue()}


def levels(members: dict[str, bytes], view: View, channels: int = 3) -> np.ndarray:
    """Decoded pixels back on the scale 0 … 255, (frames, height, width, channels)."""
    pixels = decode_view(members, view, channels).pixels
    assert pixels.shape == (view.frames, channels, view.height, view.width)
    assert pixels.is_contiguous()
    assert -1 <= pixels.min() <= pixels.max() <= 1
    return (pixels.permute(0, 2, 3, 1).numpy() + 1) * 127.5


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((found - expected) ** 2))


def test_cuts_without_scaling_are_the_picture() -> None:
    image = scene(40, 60)
    whole, members = np.asarray(image), stored(image)
    for down, across, top, left in ((0.0, 0.0, 0, 0), (1.0, 1.0, 30, 40), (0.5, 0.5, 15, 20), (0.2, 0.9, 6, 36)):
        view = View(10, 20, resize=False, down=down, across=across)
        expected = whole[top : top + 10, left : left + 20]
        np.testing.assert_allclose(levels(members, view)[0], expected, atol=1e-4)
        flipped = View(10, 20, resize=False, down=down, across=across, flip=True)
        np.testing.assert_allclose(levels(members, flipped)[0], expected[:, ::-1], atol=1e-4)
    for view in (View(41, 20, resize=False), View(10, 61, resize=False)):
        with pytest.raises(BadSampleError, match=f"picture of 40×60 pixels is smaller than {view.height}×{view.width}"):
            decode_view(members, view, 3)
    np.testing.assert_allclose(levels(members, View(40, 56, resize=False))[0], whole[:, 2:58], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "view", "box"),  # the part of the picture that covers the view, by hand: left, top, right, bottom
    [
        ((120, 200), View(30, 30), (40, 0, 160, 120)),
        ((120, 200), View(30, 30, across=0.0), (0, 0, 120, 120)),
        ((120, 200), View(30, 30, across=1.0, down=0.0), (80, 0, 200, 120)),
        ((200, 120), View(20, 60, down=1.0), (0, 160, 120, 200)),
        ((200, 120), View(20, 60, down=0.0), (0, 0, 120, 40)),
        ((30, 50), View(90, 90, across=0.0), (0, 0, 30, 30)),
        ((64, 64), View(64, 32, across=1.0), (32, 0, 64, 64)),
    ],
)
def test_views_are_cut_and_scaled_as_pillow_does(size: tuple[int, int], view: View, box: tuple[int, ...]) -> None:
    image = scene(*size)
    expected = image.crop(box).resize((view.width, view.height), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(levels(stored(image), view)[0], np.asarray(expected), atol=2)
    np.testing.assert_allclose(levels(npy(np.asarray(image)), view)[0], np.asarray(expected), atol=2)
    grey = image.convert("L")
    expected = np.asarray(grey.crop(box).resize((view.width, view.height), Image.Resampling.BICUBIC))
    for members in (stored(image), stored(grey), npy(np.asarray(image)), npy(np.asarray(grey)[..., None])):
        np.testing.assert_allclose(levels(members, view, 1)[0, ..., 0], expected, atol=2.5)
    np.testing.assert_allclose(levels(stored(grey), view, 3)[0], np.repeat(expected[..., None], 3, 2), atol=2)


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize(
    ("shorter", "reduction"), [(159, 1), (160, 2), (332, 2), (333, 4), (767, 4), (768, 8), (900, 8)]
)
def test_reduced_jpegs_look_like_whole_ones(monkeypatch, shorter: int, reduction: int, quality: int) -> None:
    # 64 pixels are taken from the shorter side.
    drafted = []
    draft = Image.Image.draft
    from PIL import JpegImagePlugin

    def watched(image, mode, size):
        drafted.append(image.width // size[0])
        return draft_of_jpeg(image, mode, size)

    draft_of_jpeg = JpegImagePlugin.JpegImageFile.draft
    assert draft_of_jpeg is not draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", watched)
    width = shorter + 3 * reduction
    members = stored(scene(shorter, width), "JPEG", quality=quality)
    found = levels(members, View(64, 64, across=1.0))[0]
    assert drafted == [reduction]
    whole = Image.open(io.BytesIO(members["jpg"]))
    side = shorter // reduction * reduction
    box = (width // reduction * reduction - side, 0, width // reduction * reduction, side)
    expected = np.asarray(whole.crop(box).resize((64, 64), Image.Resampling.BICUBIC))
    assert psnr(found, expected) > 39
    grey = levels(members, View(64, 64, across=1.0), 1)[0, ..., 0]
    expected = np.asarray(whole.convert("L").crop(box).resize((64, 64), Image.Resampling.BICUBIC))
    assert psnr(grey, expected) > 39


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_turned_pictures_are_cut_as_they_are_seen(orientation: int, form: str) -> None:
    # Pillow's own turning of the whole picture is the reference.
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = scene(240, 320)
    members = stored(image, form, exif=exif)
    way = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    image = Image.open(io.BytesIO(next(iter(members.values()))))
    seen = image if way is None else image.transpose(Image.Transpose(way))
    assert probe(members) == Probe("image", seen.height, seen.width, 1, 0.0)
    cut = View(50, 30, resize=False, down=0.1, across=0.7, flip=True)
    region = region_of(cut, seen.height, seen.width)
    part = np.asarray(seen)[region.top : region.top + 50, region.left : region.left + 30, :3][:, ::-1]
    np.testing.assert_allclose(levels(members, cut)[0], part, atol=1e-4)
    view = View(48, 40, down=0.9, across=0.0)  # of so much that JPEG is drafted at 1/2 or 1/4
    wide = seen.width > seen.height
    box = (0, 0, 200, 240)
    if not wide:  # 320 rows of which 288 are taken, 0.9 of the way down; in fours where drafted
        step = 4 if form == "JPEG" else 1
        top = (int(np.ceil(0.9 * ((320 - 288) // step + 1))) - 1) * step
        box = (0, top, 240, top + 288)
    expected = np.asarray(seen.convert("RGB").crop(box).resize((40, 48), Image.Resampling.BICUBIC))
    assert psnr(levels(members, view)[0], expected) > 40


def test_sixteen_bits_and_transparency_are_scaled_rightly() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    found = levels(stored(Image.fromarray(ramp.astype(np.uint16))), View(16, 16), 1)[0, ..., 0]
    assert len(np.unique(found)) == 256
    np.testing.assert_allclose(found[4:-4, 4:-4], ramp.reshape(16, 4, 16, 4).mean((1, 3))[4:-4, 4:-4] / 257, atol=0.05)
    # Black that is not seen must not darken the white beside it.
    image = np.zeros((64, 64, 4), np.uint8)
    image[:, :32] = 255
    np.testing.assert_allclose(levels(stored(Image.fromarray(image)), View(16, 16)), 255, atol=1e-4)
    palette = scene(64, 64).quantize(16)
    expected = np.asarray(palette.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(levels(stored(palette), View(16, 16))[0], expected, atol=2)


def test_positions_have_equal_shares() -> None:
    counts = np.bincount([position(share, 4) for share in (np.arange(1000) + 0.5) / 1000])
    np.testing.assert_array_equal(counts, [200] * 5)
    assert [position(0.5, slack) for slack in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [position(1.0, slack) for slack in range(4)] == [0, 1, 2, 3]
    assert position(0.0, 9) == 0
    assert [clip_of(View(1, 1, frames=3, frame_step=2, start=s), 10)[0] for s in (0.0, 0.5, 1.0)] == [0, 2, 5]
    assert list(clip_of(View(1, 1, frames=3, frame_step=2, start=1.0), 10)) == [5, 7, 9]


def test_views_of_any_picture_stay_within_it() -> None:
    rng = np.random.default_rng(3)
    for height, width, rows, columns in rng.integers(1, 200, (500, 4)).tolist():
        view = View(rows, columns, down=float(rng.uniform()), across=float(rng.uniform()))
        top, left, high, wide = region_of(view, height, width)
        assert 0 <= top <= top + high <= height
        assert 0 <= left <= left + wide <= width
        assert min(high, wide) >= 1
        assert high == height or wide == width
        # The aspect is right up to half a pixel of the side that is cut.
        assert abs(high * columns - wide * rows) <= 0.5 * max(rows, columns) or 1 in (high, wide)


def test_npy_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 12, 20, 3), dtype=np.uint8)
    assert probe(npy(frames)) == Probe("video", 12, 20, 7, 0.0)
    assert probe(npy(frames[0])) == Probe("image", 12, 20, 1, 0.0)
    view = View(12, 20, frames=3, frame_step=2, start=1.0, flip=True)
    np.testing.assert_allclose(levels(npy(frames), view), frames[2::2, :, ::-1], atol=1e-4)
    np.testing.assert_allclose(levels(npy(np.asfortranarray(frames)), view), frames[2::2, :, ::-1], atol=1e-4)
    np.testing.assert_allclose(levels(npy(frames[0]), View(12, 20))[0], frames[0], atol=1e-4)
    for array in (frames.astype(np.float32), frames[0, ..., 0], frames[..., :2], frames[:0], frames.astype(object)):
        members = npy(array)
        for read in (probe, lambda members: decode_view(members, View(4, 4), 3)):
            with pytest.raises(BadSampleError, match=r"must hold (uint8 pixels|plain numbers)"):
                read(members)
    with pytest.raises(BadSampleError, match="has 7 frames where 8 are needed"):
        decode_view(npy(frames), View(4, 4, frames=8), 3)


def test_what_no_view_can_be() -> None:
    picture = stored(scene(16, 16))
    for options in ({"height": 0}, {"frames": 0}, {"frame_step": 0}, {"down": -0.1}, {"across": 1.1}, {"start": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of a view must"):
            View(**{"height": 8, "width": 8} | options)
    with pytest.raises(ValueError, match="larger than 268435456 pixels"):
        View(2**14, 2**14, frames=2)
    assert View(2**14, 2**14).height ** 2 == MAX_VIEW_PIXELS
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        decode_view(picture, View(8, 8), 4)
    with pytest.raises(BadSampleError, match="has 1 frames where 2 are needed"):
        decode_view(picture, View(8, 8, frames=2), 3)
    for members, message in (
        ({"txt": b""}, "one medium of .* found none"),
        (picture | {"wav": b""}, r"\['png', 'wav'\]"),
    ):
        with pytest.raises(BadSampleError, match=message):
            probe(members)
    with pytest.raises(BadSampleError, match="wav holds no pixels"):
        decode_view({"wav": b""}, View(8, 8), 3)
    decoded = decode_view(picture | {"txt": b" a b ", "json": b'{"label": 2}'}, View(8, 8), 3)
    assert (decoded.caption, decoded.label) == ("a b", 2)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_bad_samples_and_nothing_else(form: str) -> None:
    ((extension, good),) = stored(scene(40, 60), form).items()
    rng = np.random.default_rng(0)
    for cut in (0, 1, len(good) // 3, len(good) // 2, len(good) * 4 // 5):
        with pytest.raises(BadSampleError, match="does not decode"):
            decode_view({extension: good[:cut]}, View(8, 8), 3)
    reasons = []
    for _ in range(150):
        data = bytearray(good)
        start = int(rng.integers(len(good)))
        if rng.integers(2):
            data[start] ^= 1 << int(rng.integers(8))
        else:
            data[start : start + 50] = bytes(len(data[start : start + 50]))
        for read in (probe, lambda members: decode_view(members, View(8, 8), 3)):
            try:
                read({extension: bytes(data)})
            except BadSampleError as error:
                reasons.append(str(error))
    assert len(reasons) > 10
    assert not any("\n" in reason for reason in reasons)
