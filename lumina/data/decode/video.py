"""Videos: how many frames there are, and exactly the frames of a view."""

import io
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lumina.data.decode.errors import BadSampleError, unreadable
from lumina.data.decode.geometry import MAX_PIXELS, Region, Turn, View, clip_of, region_of
from lumina.data.decode.image import levels_of, resample

VIDEO_EXTENSIONS = ("mp4", "webm", "mov", "mkv")
MAX_CLIP_PIXELS = 2**34
"""Bound on the pixels decoded for one clip, from the key frame before it to its end: 8192 frames of 1080p."""

# Decoders give up at an error in place of inventing what is missing, and before a frame of absurd size is allocated.
_OPTIONS = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class VideoSize:
    """Pixels as the video is seen, its frames, and the seconds from the first of them to the end of the last."""

    height: int
    width: int
    frames: int
    duration: float


@dataclass(frozen=True)
class _Shape:
    """A frame as stored, and how it is seen: turned, and with its pixels made square."""

    height: int
    width: int
    turn: Turn
    aspect: float

    @property
    def seen(self) -> tuple[int, int]:
        return self.turn.size(self.height, max(round(self.width * self.aspect), 1))

    def stored(self, region: Region) -> Region:
        wide = max(round(self.width * self.aspect), 1)
        top, left, rows, columns = self.turn.stored(region, self.height, wide)
        first = min(round(left * self.width / wide), self.width - 1)
        return Region(top, first, rows, max(min(round(columns * self.width / wide), self.width - first), 1))


@dataclass(frozen=True)
class _Packets:
    """All packets of a stream in the order of decoding, and which of them are seen, in the order of being seen."""

    packets: list
    shown: list[int]
    timed: bool  # frames are told apart by their time stamps; else they can only be counted from the first

    def times(self, numbers: Iterable[int]) -> list[int | None]:
        return [self.packets[self.shown[number]].pts for number in numbers]

    def key_before(self, clip: range) -> int:
        """The last packet from which all frames of the clip decode."""
        if not self.timed:
            return 0
        earliest, start = min(self.shown[number] for number in clip), self.times(clip[:1])[0]
        for index in range(earliest, 0, -1):
            packet = self.packets[index]
            if packet.is_keyframe and packet.pts is not None and packet.pts <= start:
                return index
        return 0


def video_size(data: bytes) -> VideoSize:
    """What `video_levels` would find: every packet is counted, for what a container says of itself may be wrong.

    Raises:
        BadSampleError: no video, cut, without frames, or the first of them is damaged.
    """
    with _opened(data) as (container, stream):
        found = _packets(container, stream)
        shape = _shape(stream, next(_frames(stream, found.packets)))
        return VideoSize(*shape.seen, len(found.shown), _duration(stream, found))


def video_levels(data: bytes, view: View, channels: int) -> np.ndarray:
    """The view of a video as uint8 (frames, height, width, channels).

    Raises:
        BadSampleError: as `video_size`; or the video is smaller or shorter than the view, or damaged before its end.
    """
    with _opened(data) as (container, stream):
        found = _packets(container, stream)
        clip = clip_of(view, len(found.shown))
        key = found.key_before(clip)
        try:
            return _clip(stream, found, key, clip, view, channels)
        except (BadSampleError, _ffmpeg_error()):
            if key == 0:
                raise
    # Some key frames lean on what came before them after all (open GOP in H.264): then only the first packet will do.
    with _opened(data) as (container, stream):
        return _clip(stream, _packets(container, stream), 0, clip, view, channels)


def check_frames(data: bytes) -> None:
    """Decode every frame of a video at its own size; memory is that of one frame.

    Raises:
        BadSampleError: as `video_levels` would for some view of it.
    """
    with _opened(data) as (container, stream):
        from av.video.reformatter import VideoReformatter

        found, converter = _packets(container, stream), VideoReformatter()
        for _, frame, shape in _wanted(stream, found, 0, range(len(found.shown))):
            _cut(converter, frame, Region(0, 0, shape.height, shape.width), 3)


def _clip(stream, found: _Packets, key: int, clip: range, view: View, channels: int) -> np.ndarray:
    """The frames of `clip`, decoding from packet `key` on."""
    from av.video.reformatter import VideoReformatter

    count = max(found.shown[number] for number in clip) + 1 - key
    effort = count * stream.codec_context.width * stream.codec_context.height
    if effort > MAX_CLIP_PIXELS:
        raise BadSampleError(
            f"clip has {effort} pixels from the key frame before it to its end, over {MAX_CLIP_PIXELS}"
        )
    levels = np.empty((view.frames, view.height, view.width, channels), np.uint8)
    converter = VideoReformatter()
    for slot, frame, shape in _wanted(stream, found, key, clip):
        cut = _cut(converter, frame, shape.stored(region_of(view, *shape.seen)), channels)
        levels[slot] = shape.turn.apply(resample(cut, *shape.turn.size(view.height, view.width)))
    return levels


def _wanted(stream, found: _Packets, key: int, clip: range) -> Iterator[tuple[int, Any, _Shape]]:
    """(place in the clip, frame, its shape) of each frame of `clip`, decoding from packet `key` on.

    Raises:
        BadSampleError: one of them does not come, or frames change in size.
    """
    wanted = {name: slot for slot, name in enumerate(found.times(clip) if found.timed else clip)}
    shape = None
    for number, frame in enumerate(_frames(stream, found.packets[key:])):
        if shape is None:
            shape = _shape(stream, frame)
        elif (frame.height, frame.width) != (shape.height, shape.width):
            raise BadSampleError(
                f"video changes from {shape.height}×{shape.width} to {frame.height}×{frame.width} pixels"
            )
        slot = wanted.pop(frame.pts if found.timed else number, None)
        if slot is not None:
            yield slot, frame, shape
        if not wanted:
            return
    raise BadSampleError(f"video does not decode ({len(wanted)} of {len(clip)} frames are missing)")


def _cut(converter, frame, region: Region, channels: int) -> np.ndarray:
    """Levels of a part of a frame, uint8 (rows, columns, channels)."""
    transparent = any(component.is_alpha for component in frame.format.components)
    # Players take untagged video of at least 720 lines for BT.709, smaller ones for BT.601; swscale takes 601 for all.
    untagged = int(frame.colorspace) == _UNSPECIFIED and frame.height >= 720
    rgb = converter.reformat(
        frame, format="rgba" if transparent else "rgb24", src_colorspace="ITU709" if untagged else None
    )
    top, left, rows, columns = region
    levels = rgb.to_ndarray()[top : top + rows, left : left + columns]
    if transparent or channels == 1:
        return levels_of(Image.fromarray(np.ascontiguousarray(levels)), channels)
    return levels


@contextmanager
def _opened(data: bytes) -> Iterator[tuple]:
    """The container and its video stream; what FFmpeg raises while it is open becomes `BadSampleError`."""
    try:
        import av
    except ImportError as error:
        raise ValueError("videos need PyAV: pip install 'lumina-t2x[video]'") from error
    form = _form(data)
    try:
        # One named demuxer: a playlist in an .mp4 would otherwise make FFmpeg open other files and addresses.
        with av.open(io.BytesIO(data), format=form, metadata_errors="replace", options=_OPTIONS) as container:
            # A cover picture is no video.
            streams = [s for s in container.streams.video if not int(getattr(s, "disposition", 0)) & _ATTACHED_PICTURE]
            if not streams or streams[0].codec_context is None:
                raise BadSampleError("video has no stream of pictures that can be decoded")
            context = streams[0].codec_context
            context.options = dict(_OPTIONS)
            context.thread_count = 1  # workers are the threads
            yield container, streams[0]
    except av.FFmpegError as error:
        raise unreadable("video", error) from error


def _ffmpeg_error() -> type[Exception]:
    import av

    return av.FFmpegError


def _form(data: bytes) -> str:
    """FFmpeg's name of the container; `BadSampleError` for others, and for one that is cut."""
    if data[:4] == b"\x1aE\xdf\xa3":
        _check_matroska(data)
        return "matroska"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        _check_boxes(data)
        return "mov"
    raise BadSampleError("video is neither MP4 (MOV) nor WebM (Matroska)")


def _check_boxes(data: bytes) -> None:
    """`BadSampleError` where the last top-level box of an MP4 ends after the file: FFmpeg might serve what is left."""
    start = 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        elif size == 0:  # to the end of the file
            return
        if size < 8:
            raise BadSampleError(f"video is damaged at byte {start}")
        start += size
    if start > len(data):
        raise BadSampleError(f"video is cut: {len(data)} bytes of {start}")


def _check_matroska(data: bytes) -> None:
    """The same for the segment of a Matroska file, where its size is known."""

    def number(at: int) -> tuple[int, int, bool]:
        """Value and end of the number at `at`, and whether it means "unknown"."""
        first = data[at] if at < len(data) else 0
        length = 9 - first.bit_length()
        bits = 7 * length
        value = int.from_bytes(data[at : at + length], "big") & (2**bits - 1)
        return value, at + length, value == 2**bits - 1

    size, start, _ = number(4)
    start += size
    if data[start : start + 4] != b"\x18\x53\x80\x67":
        raise BadSampleError("video is damaged: its first segment is missing")
    size, start, unknown = number(start + 4)
    if not unknown and start + size > len(data):
        raise BadSampleError(f"video is cut: {len(data)} bytes of {start + size}")


def _packets(container, stream) -> _Packets:
    packets, shown = [], []
    for packet in container.demux(stream):
        if not packet.size:  # a frame that is the one before it, or the end
            continue
        if packet.is_corrupt:
            raise BadSampleError(f"video is cut or damaged at packet {len(packets)}")
        # Bit 4 of a VP8 frame says whether it is seen; the references that are not have packets of their own.
        hidden = stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
        if not packet.is_discard and not hidden:
            shown.append(len(packets))
        packets.append(packet)
    if not shown:
        raise BadSampleError("video has no frames")
    times = {packets[index].pts for index in shown}
    timed = None not in times and len(times) == len(shown)
    return _Packets(packets, sorted(shown, key=lambda index: packets[index].pts) if timed else shown, timed)


def _frames(stream, packets: list) -> Iterator:
    """The frames of the packets; at least one, or `BadSampleError`."""
    there = False
    for packet in (*packets, None):
        for frame in stream.codec_context.decode(packet):
            if frame.is_corrupt:
                raise BadSampleError("video does not decode (a frame is damaged)")
            there = True
            yield frame
    if not there:
        raise BadSampleError("video does not decode (no frame comes out)")


def _shape(stream, frame) -> _Shape:
    if frame.height * frame.width > MAX_PIXELS:
        raise BadSampleError(f"video of {frame.height}×{frame.width} pixels is larger than {MAX_PIXELS} pixels")
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= aspect <= 10:
        raise BadSampleError(f"video has pixels {aspect:g} times as wide as high")
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) != 36:
        return _Shape(frame.height, frame.width, Turn(), aspect)
    # Where a step to the right (a, b) and a step down (c, d) in what is stored lead in what is seen.
    a, b, _, c, d, *_ = struct.unpack("9i", matrix)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return _Shape(frame.height, frame.width, Turn(b < 0, c < 0, swap=True), aspect)
    return _Shape(frame.height, frame.width, Turn(a < 0, d < 0), aspect)


def _duration(stream, found: _Packets) -> float:
    """Seconds from the first frame to the end of the last; 0 where the file has no times."""
    count = len(found.shown)
    if not found.timed or stream.time_base is None:
        return count / float(stream.average_rate) if stream.average_rate else 0.0
    first, last = (found.packets[found.shown[number]] for number in (0, -1))
    between = float((last.pts - first.pts) * stream.time_base)
    if last.duration:
        return between + float(last.duration * stream.time_base)
    if count > 1:
        return between * count / (count - 1)
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0
