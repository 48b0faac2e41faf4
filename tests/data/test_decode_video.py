"""Videos: exactly the frames asked for, as they are seen, out of every container; damage is named."""

import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from lumina.data.decode import BadSampleError, View, decode_view, probe
from lumina.data.decode import video as video_module
from lumina.data.decode.geometry import clip_of

FRAMES, HEIGHT, WIDTH = 40, 48, 64
# Key frames are rare, so that a clip begins between them, and frames are reordered where the codec can.
FORMS = {
    "h264.mp4": ("libx264", "mp4", {"g": "12", "bf": "3", "crf": "8"}, {}),
    "h264-open.mp4": ("libx264", "mp4", {"crf": "8", "x264-params": "keyint=10:min-keyint=10:open-gop=1"}, {}),
    "h264-fragments.mp4": ("libx264", "mp4", {"g": "12", "crf": "8"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mov": ("libx264", "mov", {"g": "12", "bf": "0", "crf": "8"}, {}),
    "h264.mkv": ("libx264", "matroska", {"g": "12", "bf": "3", "crf": "8"}, {}),
    "mpeg4.mp4": ("mpeg4", "mp4", {"g": "12", "bf": "2", "qmin": "1", "qmax": "2"}, {}),
    "vp9.webm": ("libvpx-vp9", "webm", {"g": "12", "crf": "8", "b": "0"}, {}),
    "vp8.webm": ("libvpx", "webm", {"g": "20", "crf": "4", "b": "2M"}, {}),
    "ffv1.mkv": ("ffv1", "matroska", {"g": "5"}, {}),
}


def grey(number: int) -> int:
    return 30 + 5 * number


def encoded(form: str, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, aspect: int = 1) -> bytes:
    """Frame n has grey(n) and a white corner, top left."""
    codec, container, options, container_options = FORMS[form]
    stream = io.BytesIO()
    with av.open(stream, "w", format=container, options=container_options) as file:
        track = file.add_stream(codec, rate=25, options=options)
        track.height, track.width, track.pix_fmt = height, width, "yuv420p"
        track.codec_context.sample_aspect_ratio = aspect
        for number in range(frames):
            levels = np.full((height, width, 3), grey(number), np.uint8)
            levels[:16, :16] = 255
            file.mux(track.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


@pytest.fixture(scope="module")
def videos() -> dict[str, bytes]:
    return {form: encoded(form) for form in FORMS}


def members_of(form: str, data: bytes) -> dict[str, bytes]:
    return {form.rpartition(".")[2]: data}


def levels(members: dict[str, bytes], view: View, channels: int = 3) -> np.ndarray:
    """(frames, height, width, channels) on the scale 0 … 255."""
    pixels = decode_view(members, view, channels).pixels
    assert pixels.shape == (view.frames, channels, view.height, view.width)
    return (pixels.permute(0, 2, 3, 1).numpy() + 1) * 127.5


@pytest.mark.parametrize("form", FORMS)
def test_clips_are_exactly_the_frames_asked_for(videos, form: str) -> None:
    members = members_of(form, videos[form])
    found = probe(members)
    assert (found.kind, found.height, found.width, found.frames) == ("video", HEIGHT, WIDTH, FRAMES)
    assert found.duration == pytest.approx(FRAMES / 25, abs=0.002)
    with av.open(io.BytesIO(videos[form])) as file:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert len(everything) == FRAMES
    for start in np.linspace(0, 1, 7).tolist():
        for frames, step in ((1, 1), (4, 3), (14, 1)):
            view = View(HEIGHT, WIDTH, frames=frames, frame_step=step, start=start, resize=False)
            clip = levels(members, view)
            numbers = clip_of(view, FRAMES)
            # Grey levels say which frame it is without trusting any decoder's order.
            np.testing.assert_allclose(clip[:, 40, 40, 1], [grey(number) for number in numbers], atol=2.4)
            np.testing.assert_allclose(clip, everything[numbers], atol=1e-3)
    with pytest.raises(BadSampleError, match=f"video has {FRAMES} frames where {FRAMES + 1} are needed"):
        decode_view(members, View(8, 8, frames=FRAMES + 1), 3)


def test_views_are_scaled_cut_and_grey(videos) -> None:
    members = members_of("ffv1.mkv", videos["ffv1.mkv"])
    with av.open(io.BytesIO(videos["ffv1.mkv"])) as file:
        first = next(file.decode(video=0)).to_image()
    cut = first.crop((0, 0, 48, 48))
    expected = cut.resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(levels(members, View(24, 24, across=0.0, start=0.0))[0], np.asarray(expected), atol=2)
    flipped = levels(members, View(24, 24, across=0.0, start=0.0, flip=True), 1)[0, ..., 0]
    np.testing.assert_allclose(flipped, np.asarray(expected.convert("L"))[:, ::-1], atol=2)
    with pytest.raises(BadSampleError, match="picture of 48×64 pixels is smaller than 49×64"):
        decode_view(members, View(49, 64, resize=False), 3)


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [  # a, b, c, d as in ISO/IEC 14496-12: a stored (x, y) is seen at (ax + cy, bx + dy)
        ((0, 1, -1, 0), (WIDTH, HEIGHT), (0, -1)),  # a quarter turn clockwise: the white corner goes to the right
        ((-1, 0, 0, -1), (HEIGHT, WIDTH), (-1, -1)),
        ((0, -1, 1, 0), (WIDTH, HEIGHT), (-1, 0)),
        ((-1, 0, 0, 1), (HEIGHT, WIDTH), (0, -1)),
    ],
)
def test_phones_that_were_turned(videos, matrix: tuple[int, ...], size: tuple[int, int], corner: tuple) -> None:
    data = videos["h264.mp4"]
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    start = data.index(upright, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    members = {"mp4": data[:start] + turned + data[start + 36 :]}
    assert (probe(members).height, probe(members).width) == size
    seen = levels(members, View(*size, start=0.0), 1)[0, ..., 0]
    corners = {(y, x): seen[y, x] for y in (0, -1) for x in (0, -1)}
    assert {place for place, level in corners.items() if level > 200} == {corner}
    # A cut is made in what is seen.
    cut = View(16, 16, resize=False, down=float(corner[0] == -1), across=float(corner[1] == -1), start=0.0)
    assert levels(members, cut, 1)[0, 4:-4, 4:-4].min() > 200


def test_pixels_that_are_not_square() -> None:
    members = {"mp4": encoded("h264.mp4", frames=2, aspect=2)}
    assert (probe(members).height, probe(members).width) == (HEIGHT, 2 * WIDTH)
    seen = levels(members, View(HEIGHT, 2 * WIDTH, start=0.0, resize=False), 1)[0, ..., 0]
    assert (seen[8, :30] > 200).all()
    assert (seen[8, 36:] < 60).all()


def test_hidden_packets_are_no_frames(videos) -> None:
    # Packets that are decoded and not seen, as VP8's alternate references: bit 4 of their first byte is 0.
    stream = io.BytesIO()
    with av.open(io.BytesIO(videos["vp8.webm"])) as source, av.open(stream, "w", format="webm") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            if number in (5, 17):
                data[0] &= ~0x10
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, track
            target.mux(copy)
    members = {"webm": stream.getvalue()}
    assert probe(members).frames == FRAMES - 2
    seen = [number for number in range(FRAMES) if number not in (5, 17)]
    clip = levels(members, View(HEIGHT, WIDTH, frames=FRAMES - 2, resize=False))
    np.testing.assert_allclose(clip[:, 40, 40, 0], [grey(number) for number in seen], atol=2.4)


def test_a_container_that_lies_about_its_frames(videos) -> None:
    data = videos["h264.mp4"]
    # The duration of the track and of the film, set to an hour: no frame more comes of it.
    for box, offset in ((b"mdhd", 20), (b"tkhd", 24), (b"mvhd", 20)):
        at = data.index(box) + offset
        data = data[:at] + (3600 * 12800).to_bytes(4, "big") + data[at + 4 :]
    found = probe({"mp4": data})
    assert found.frames == FRAMES
    assert found.duration == pytest.approx(FRAMES / 25, abs=0.002)


def test_bombs_and_strangers_are_refused(videos, monkeypatch) -> None:
    playlist = b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as file:
        track = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(track.encode(frame))
        file.mux(track.encode())
    empty = io.BytesIO()
    with av.open(empty, "w", format="matroska") as file:
        track = file.add_stream("ffv1", rate=25)
        track.height, track.width, track.pix_fmt = 16, 16, "yuv420p"
        file.start_encoding()
    for data, message in (
        (b"", "neither MP4"),
        (playlist, "neither MP4"),
        (sound.getvalue(), "no stream of pictures"),
        (empty.getvalue(), "does not decode|no frames"),
    ):
        for read in (probe, lambda members: decode_view(members, View(8, 8), 3)):
            with pytest.raises(BadSampleError, match=message):
                read({"mp4": data})
    members = members_of("h264.mp4", videos["h264.mp4"])
    monkeypatch.setattr(video_module, "MAX_CLIP_PIXELS", 12 * HEIGHT * WIDTH)
    decode_view(members, View(8, 8, start=0.9), 3)  # near a key frame
    with pytest.raises(BadSampleError, match="pixels from the key frame before it to its end"):
        decode_view(members, View(8, 8, frames=14), 3)
    monkeypatch.setitem(video_module._OPTIONS, "max_pixels", str(HEIGHT * WIDTH - 1))
    with pytest.raises(BadSampleError, match="does not decode"):
        probe(members_of("ffv1.mkv", videos["ffv1.mkv"]))
    monkeypatch.setattr(video_module, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    monkeypatch.setitem(video_module._OPTIONS, "max_pixels", str(HEIGHT * WIDTH * 2))
    with pytest.raises(BadSampleError, match=f"video of {HEIGHT}×{WIDTH} pixels is larger than"):
        probe(members_of("ffv1.mkv", videos["ffv1.mkv"]))


@pytest.mark.parametrize("form", [form for form in FORMS if "fragments" not in form])
def test_cut_videos_are_refused_by_the_probe(videos, form: str) -> None:
    # A file of fragments that is cut between two of them is a shorter file of fragments.
    data = videos[form]
    for length in (1, 20, len(data) // 3, len(data) // 2, len(data) - 100, len(data) - 1):
        with pytest.raises(BadSampleError) as caught:
            probe(members_of(form, data[:length]))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadSampleError):
        probe(members_of(form, bytes(len(data))))


@pytest.mark.parametrize("form", FORMS)
def test_damaged_videos_are_bad_samples_and_nothing_else(videos, form: str) -> None:
    good, rng, reasons = videos[form], np.random.default_rng(1), []
    for _ in range(50):
        data = bytearray(good)
        start = int(rng.integers(len(good)))
        if rng.integers(2):
            data[start] ^= 1 << int(rng.integers(8))
        else:
            data[start : start + 200] = bytes(len(data[start : start + 200]))
        members = members_of(form, bytes(data))
        for read in (probe, lambda members: decode_view(members, View(16, 16, frames=9), 3)):
            try:
                read(members)
            except BadSampleError as error:
                reasons.append(str(error))
    assert len(reasons) > 5
    assert not any("\n" in reason for reason in reasons)
