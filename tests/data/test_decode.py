"""Decoding: every kind of picture people have, and what is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lumina.data.decode import BadSampleError, Decoded, View, decode_view, probe
from lumina.data.shard_index import KINDS
from lumina.data.sizing import Shapes, Sizing, Stage

GREY = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)


def stored(image: Image.Image, form: str = "PNG", **options: object) -> dict[str, bytes]:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return {{"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[form]: stream.getvalue()}


def decode(members: dict[str, bytes], channels: int) -> Decoded:
    """The whole picture."""
    found = probe(members)
    assert (found.kind, found.frames, found.duration) == ("image", 1, 0)
    return decode_view(members, View(found.height, found.width, resize=False), channels)


def levels(members: dict[str, bytes], channels: int = 3) -> np.ndarray:
    """Its pixels back on the scale 0 … 255, (height, width, channels)."""
    pixels = decode(members, channels).pixels
    assert pixels.shape[:2] == (1, channels)
    assert pixels.is_contiguous()
    assert pixels.abs().max() <= 1
    return (pixels[0].permute(1, 2, 0).numpy() + 1) * 127.5


def test_grey_and_rgb_are_exact() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(levels(stored(Image.fromarray(GREY)), 1)[..., 0], GREY, atol=1e-4)
    np.testing.assert_allclose(levels(stored(Image.fromarray(GREY)), 3), np.repeat(GREY[..., None], 3, 2), atol=1e-4)
    np.testing.assert_allclose(levels(stored(Image.fromarray(rgb)), 3), rgb, atol=1e-4)
    np.testing.assert_allclose(levels(stored(Image.fromarray(rgb), "WEBP", lossless=True), 3), rgb, atol=1e-4)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(levels(stored(Image.fromarray(rgb)), 1)[..., 0], luma, atol=1.01)
    assert decode(stored(Image.new("L", (4, 4), 0)), 1).pixels.unique().tolist() == [-1]
    assert decode(stored(Image.new("L", (4, 4), 255)), 1).pixels.unique().tolist() == [1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    # One dark corner, top left in the turned picture of orientation 1; where it goes is what EXIF 2.3 defines.
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    image = np.full((16, 32), 255, np.uint8)
    image[:8, :8] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    members = stored(Image.fromarray(image), form, exif=exif)
    turned = levels(members, 1)[..., 0]
    assert turned.shape == ((32, 16) if orientation >= 5 else (16, 32))
    corners = {(y, x): turned[y, x] for y in (0, -1) for x in (0, -1)}
    assert min(corners, key=corners.get) == corner[orientation]


def test_alpha_is_laid_on_white() -> None:
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2, :, 3] = 255
    image[2, :, 3] = 51  # a fifth opaque black
    expected = np.array([0, 0, 204, 255])
    np.testing.assert_allclose(levels(stored(Image.fromarray(image)))[:, 0, 1], expected, atol=0.6)
    grey_alpha = Image.fromarray(image).convert("LA")
    np.testing.assert_allclose(levels(stored(grey_alpha), 1)[:, 0, 0], expected, atol=0.6)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    np.testing.assert_allclose(levels(stored(palette))[0, 0], [10, 20, 30], atol=1e-4)
    np.testing.assert_allclose(levels(stored(palette, transparency=1))[0, 0], [255] * 3, atol=1e-4)
    np.testing.assert_allclose(levels(stored(Image.new("L", (2, 2), 7), transparency=7))[0, 0], [255] * 3, atol=1e-4)


def test_cmyk_is_turned_into_rgb() -> None:
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan: no red
    found = levels(stored(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(found[8, 8], [0, 255, 255], atol=4)


def test_sixteen_bits_keep_their_precision() -> None:
    values = np.arange(0, 65536, 257 * 5, dtype=np.uint16)[:48].reshape(4, 12) + 3
    found = levels(stored(Image.fromarray(values)), 1)[..., 0]
    np.testing.assert_allclose(found, values / 257, atol=1e-3)
    assert len(np.unique(found)) == 48


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_png_mode_decodes(mode: str, channels: int) -> None:
    image = Image.new(mode, (9, 5))
    assert levels(stored(image), channels).shape == (5, 9, channels)


def test_the_middle_is_cut_out() -> None:
    members = stored(Image.fromarray(GREY))
    pixels = decode_view(members, View(8, 16, resize=False), 1).pixels[0, 0]
    np.testing.assert_allclose((pixels.numpy() + 1) * 127.5, GREY[2:10, 2:18], atol=1e-4)
    with pytest.raises(BadSampleError, match="picture of 12×20 pixels is smaller than 16×16"):
        decode_view(members, View(16, 16, resize=False), 1)


def test_planned_size_is_decoded_size() -> None:
    sides = (1, 7, 8, 9, 16, 31)
    pictures = [stored(Image.new("L", (width, height))) for height in sides for width in sides]
    found = [probe(members) for members in pictures]
    shapes = [(KINDS.index(of.kind), of.height, of.width, of.frames) for of in found]
    planned = Sizing(8, (Stage(0, None),)).sizes(Shapes(*np.array(shapes).T), 0)
    expected = [(1, h // 8 * 8, w // 8 * 8) if min(h, w) >= 8 else (0, 0, 0) for h in sides for w in sides]
    assert np.stack(planned, -1).tolist() == [list(size) for size in expected]
    for members, (frames, height, width) in zip(pictures, expected, strict=True):
        if frames:
            assert decode_view(members, View(height, width, resize=False), 1).pixels.shape == (1, 1, height, width)
        else:
            with pytest.raises(BadSampleError, match="smaller than 8×8"):
                decode_view(members, View(8, 8, resize=False), 1)


def test_bombs_are_refused_undecoded() -> None:
    png = bytearray(stored(Image.new("1", (8, 8)))["png"])
    import zlib

    for side in (10_000, 60_000):  # Pillow warns of the first and raises at the second
        png[16:24] = side.to_bytes(4, "big") * 2
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        for read in (probe, lambda members: decode_view(members, View(8, 8), 1)):
            with pytest.raises(BadSampleError, match="larger than 89478485 pixels"):
                read({"png": bytes(png)})


def test_what_is_no_picture_is_refused() -> None:
    good = stored(Image.fromarray(GREY))["png"]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    gif = io.BytesIO()
    Image.fromarray(GREY).save(gif, "GIF")
    frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in (0, 255)]
    for members, message in (
        ({"png": good[: len(good) // 2]}, "does not decode"),
        ({"png": bytes(flipped)}, "does not decode"),
        ({"png": b""}, "does not decode"),
        ({"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "does not decode"),
        ({"png": gif.getvalue()}, "does not decode"),
        (stored(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "an animation of 2 frames"),
        ({"txt": b"x"}, "needs one medium .* found none"),
        ({"png": good, "jpg": good}, r"found \['jpg', 'png'\]"),
    ):
        with pytest.raises(BadSampleError, match=message) as caught:
            decode_view(members, View(12, 20, resize=False), 1)
        assert "\n" not in str(caught.value)


def test_captions_and_labels() -> None:
    picture = stored(Image.fromarray(GREY))

    def read(**members: bytes) -> tuple[str | None, int | None]:
        decoded = decode(picture | members, 1)
        return decoded.caption, decoded.label

    fields = json.dumps({"caption": " from json ", "label": 3}).encode()
    assert read() == (None, None)
    assert read(txt=" ein Käfer\n".encode()) == ("ein Käfer", None)
    assert read(json=fields) == ("from json", 3)
    assert read(json=fields, txt=b"from txt") == ("from txt", 3)
    assert read(txt=b"  ") == ("", None)
    for members, message in (
        ({"txt": b"\xff\xfe"}, "caption is not UTF-8"),
        ({"txt": b"a\0b"}, "zero bytes"),
        ({"json": b"{"}, ".json does not parse"),
        ({"json": b"[1]"}, "must hold an object, not list"),
        ({"json": b'{"caption": 4}'}, '"caption" in .json must be text, not int'),
        ({"json": b'{"label": -1}'}, '"label" in .json must be a whole number from 0 to 2⁶³ - 1, not -1'),
        ({"json": b'{"label": 9223372036854775808}'}, "from 0 to 2⁶³ - 1, not 9223372036854775808"),
        ({"json": b'{"label": %s}' % (b"9" * 4000)}, "from 0 to 2⁶³ - 1, not 9{100}$"),
        ({"json": b'{"label": %s}' % (b"9" * 5000)}, ".json does not parse"),
        ({"json": b'{"label": true}'}, '"label" in .json must be a whole number'),
        ({"json": b'{"label": "7"}'}, '"label" in .json must be a whole number'),
    ):
        with pytest.raises(BadSampleError, match=message):
            read(**members)
    assert read(json=b'{"label": 9223372036854775807}') == (None, 2**63 - 1)
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        decode(picture, 4)
