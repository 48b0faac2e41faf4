"""What `lumina sample` writes of pictures and films, read back by other means."""

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lumina.cli import main
from lumina.inference import media
from lumina.inference.media import save_gif, save_mp4, save_sheet
from tests.unit.test_pipeline import TINY, write_folder

SIZES = ["--height", "4", "--width", "6", "--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        "grey": write_folder(root / "grey", replace(TINY, frames=True)),
        "rgb": write_folder(root / "rgb", replace(TINY, frames=True, in_channels=3)),
    }


def draw(folder, out, *options):
    return main(["sample", str(folder), "--prompt", "a two", "a six", "--out", str(out), *SIZES, *options])


def halves(count, height, width, mode="RGB", seed=0):
    """Frames of two colours, the border in the middle."""
    numbers = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        levels = np.empty((height, width, 3), np.uint8)
        levels[:] = numbers.integers(0, 256, 3)
        levels[:, : width // 2] = numbers.integers(0, 256, 3)
        frames.append(Image.fromarray(levels).convert(mode))
    return frames


def decoded(path):
    """(frames as RGB, planes of luma, frames a second, codec, seconds of each frame's start) by PyAV's decoder."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        rgb = [frame.to_ndarray(format="rgb24") for frame in frames]
        assert {frame.format.name for frame in frames} == {"yuv420p"}
        luma = [np.asarray(frame.planes[0]).reshape(-1, frame.planes[0].line_size) for frame in frames]
        luma = [plane[:, : rgb[0].shape[1]] for plane in luma]
        starts = [frame.pts * frame.time_base for frame in frames]
        return rgb, luma, stream.average_rate, stream.codec.name, starts


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("size", "shown"),
    [((16, 16), (128, 128)), ((15, 33), (150, 330)), ((127, 200), (254, 400)), ((129, 130), (130, 130))],
)
def test_mp4_is_the_frames(tmp_path, mode, size, shown):
    frames = halves(4, *size, mode=mode)
    save_mp4(frames, tmp_path / "a.mp4", fps=12.5)
    found, luma, rate, codec, starts = decoded(tmp_path / "a.mp4")
    assert (len(found), codec, rate) == (4, "h264", Fraction(25, 2))
    assert starts == [Fraction(2 * n, 25) for n in range(4)]
    times = shown[0] // size[0]
    for frame, picture, plane in zip(frames, found, luma, strict=True):
        wanted = np.asarray(frame.convert("RGB")).repeat(times, 0).repeat(times, 1).astype(int)
        height, width = wanted.shape[:2]
        assert picture.shape == (*shown, 3)
        # Away from the border, which half of the resolution of colours blurs where frames are not magnified.
        inner = np.abs(np.arange(width) - width // 2) > 8
        assert np.abs(picture[:height, :width][:, inner] - wanted[:, inner]).max() <= 8
        # BT.709's luma in its limited range, by its definition.
        expected = 16 + 219 / 255 * (wanted @ (0.2126, 0.7152, 0.0722))
        assert np.abs(plane[:height, :width][:, inner] - expected[:, inner]).max() <= 2.5
        # An odd side grows by what is next to it.
        assert np.abs(picture[height - 1, :width].astype(int) - picture[-1, :width]).max(initial=0) <= 8


def test_small_frames_keep_the_colour_of_every_pixel(tmp_path):
    levels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    save_mp4([Image.fromarray(frame) for frame in levels], tmp_path / "a.mp4")
    for frame, picture in zip(levels, decoded(tmp_path / "a.mp4")[0], strict=True):
        middles = picture[4::8, 4::8].astype(int)  # of the 8 by 8 that each pixel became
        assert np.abs(middles - frame).mean() < 6


def test_without_h264_the_build_gives_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "_ENCODERS", ("no_such_encoder", "mpeg4"))
    frames = halves(3, 16, 16)
    save_mp4(frames, tmp_path / "a.mp4")
    found, _, rate, codec, _ = decoded(tmp_path / "a.mp4")
    assert (codec, rate, len(found)) == ("mpeg4", 8, 3)
    for frame, picture in zip(frames, found, strict=True):
        assert np.abs(picture[4::8, 4::8].astype(int) - np.asarray(frame)).mean() < 8


def test_gif_lasts_as_long_as_it_should(tmp_path):
    frames = halves(12, 6, 9, "L")
    save_gif(frames, tmp_path / "a.gif", fps=24.0)
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (12, (9, 6), 0)
        total = 0
        for number, frame in enumerate(frames):
            film.seek(number)
            total += film.info["duration"]
            assert abs(total - (number + 1) * 1000 / 24) <= 5
            assert np.array_equal(np.asarray(film.convert("L")), np.asarray(frame))


@pytest.mark.parametrize(("count", "columns"), [(2, 2), (4, 2), (7, 3), (12, 4)])
def test_cells_of_a_sheet_are_the_frames(tmp_path, count, columns):
    frames = [Image.fromarray(levels) for levels in np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), "u1")]
    save_sheet(frames, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        sheet = np.asarray(opened)
    high, wide, gap = 80, 96, 4  # magnified four times
    assert sheet.shape == (gap + -(-count // columns) * (high + gap), gap + columns * (wide + gap), 3)
    for number, frame in enumerate(frames):
        top, left = gap + number // columns * (high + gap), gap + number % columns * (wide + gap)
        cell = sheet[top : top + high, left : left + wide]
        assert np.array_equal(cell, np.asarray(frame).repeat(4, 0).repeat(4, 1))
        sheet = sheet.copy()
        sheet[top : top + high, left : left + wide] = 255
    assert (sheet == 255).all()


@pytest.mark.parametrize("channels", ["grey", "rgb"])
@pytest.mark.parametrize(
    ("options", "suffix", "fps"),
    [
        (["--frames", "1"], ".png", None),
        (["--frames", "5"], ".mp4", 8.0),
        (["--frames", "5", "--format", "mp4", "--fps", "5"], ".mp4", 5.0),
        (["--frames", "5", "--format", "gif"], ".gif", 8.0),
        (["--frames", "5", "--format", "sheet"], ".png", None),
    ],
)
def test_forms(folders, tmp_path, channels, options, suffix, fps):
    from lumina import LuminaPipeline

    out = tmp_path / "out"
    assert draw(folders[channels], out, *options) == 0
    records = json.loads((out / "samples.json").read_text())
    assert [record["file"] for record in records] == [f"{number:06d}{suffix}" for number in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == [*(r["file"] for r in records), "samples.json", "sheet.png"]
    assert records[0]["settings"]["fps"] == fps
    frames = int(options[1])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pipeline = LuminaPipeline.from_pretrained(folders[channels], device="cpu")
    wanted = pipeline(["a two", "a six"], 4, 6, frames, 2, generator=generators).frames
    whole = [[np.asarray(frame.convert("RGB")).astype(int) for frame in of] for of in wanted]
    for record, of in zip(records, whole, strict=True):
        path = out / record["file"]
        if suffix == ".mp4":
            found, _, rate, *_ = decoded(path)
            assert rate == fps
            for frame, picture in zip(of, found, strict=True):
                assert np.abs(picture[16::32, 16::32].astype(int) - frame).mean() < 8
        elif suffix == ".gif":
            with Image.open(path) as film:
                for number, frame in enumerate(of):
                    film.seek(number)
                    assert np.array_equal(np.asarray(film.convert("RGB")), frame)
        elif frames == 1:
            with Image.open(path) as picture:
                assert np.array_equal(np.asarray(picture.convert("RGB")), of[0])
        else:
            with Image.open(path) as sheet:  # three columns of cells of 96 by 64
                levels = np.asarray(sheet.convert("RGB"))
                for number, frame in enumerate(of):
                    top, left = 4 + number // 3 * 68, 4 + number % 3 * 100
                    assert np.array_equal(levels[top : top + 64 : 16, left : left + 96 : 16], frame)
    # All on one sheet: samples side by side, or, of several frames, each a row.
    with Image.open(out / "sheet.png") as sheet:
        levels = np.asarray(sheet.convert("RGB"))
    assert levels.shape == ((72, 204, 3) if frames == 1 else (4 + 2 * 68, 4 + 5 * 100, 3))
    for sample, of in enumerate(whole):
        for number, frame in enumerate(of):
            row, column = (0, sample) if frames == 1 else (sample, number)
            top, left = 4 + row * 68, 4 + column * 100
            assert np.array_equal(levels[top : top + 64 : 16, left : left + 96 : 16], frame)


def test_long_films_show_twelve_frames_on_the_sheet(folders, tmp_path):
    assert draw(folders["grey"], tmp_path / "out", "--frames", "23", "--format", "gif") == 0
    with Image.open(tmp_path / "out" / "sheet.png") as sheet, Image.open(tmp_path / "out" / "000001.gif") as film:
        levels = np.asarray(sheet)
        assert levels.shape == (4 + 2 * 68, 4 + 12 * 100)
        for column in range(12):
            film.seek(2 * column)
            left = 4 + column * 100
            assert np.array_equal(levels[72 : 72 + 64 : 16, left : left + 96 : 16], np.asarray(film.convert("L")))


def test_without_pyav_films_are_gif(folders, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("lumina.inference.form.has_pyav", lambda: False)
    assert draw(folders["grey"], tmp_path / "a", "--frames", "2") == 0
    assert (tmp_path / "a" / "000000.gif").is_file()
    assert draw(folders["grey"], tmp_path / "b", "--frames", "2", "--format", "mp4") == 2
    assert "MP4 needs PyAV: pip install 'lumina-t2x[video]', or give --format gif" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "png", "--frames", "2"], "--format png: a PNG holds one frame; take mp4, gif, or sheet for 2"),
        (["--format", "mp4"], "--format mp4 is for several frames; take png for one"),
        (["--format", "gif"], "--format gif is for several frames"),
        (["--format", "sheet"], "--format sheet is for several frames"),
        (["--fps", "8"], "--fps is of mp4 and gif; what is written here (png) does not move"),
        (["--frames", "2", "--format", "sheet", "--fps", "8"], "what is written here (sheet) does not move"),
        (["--frames", "2", "--fps", "0"], "0 frames a second: mp4 takes more than 0 and at most 120"),
        (["--frames", "2", "--fps", "nan"], "nan frames a second: mp4 takes more than 0"),
        (
            ["--frames", "2", "--format", "gif", "--fps", "60"],
            "60 frames a second: gif takes more than 0 and at most 50",
        ),
        (["--frames", "2", "--format", "mp4", "--seconds", "1"], "--seconds is of sound; --format mp4 has none"),
        (["--format", "png", "--vocoder", "v"], "--vocoder is of sound; --format png has none"),
        (["--vae-tiling"], "there is nothing to tile: the autoencoder is identity"),
        (["--vae-slicing"], "there is nothing to slice: the autoencoder is identity"),
        (["--device", "cpu", "--cpu-offload"], "--cpu-offload is for sampling on a GPU"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_refusals(folders, tmp_path, capsys, options, words):
    assert draw(folders["grey"], tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_the_folder_of_another(folders, tmp_path):
    """Two that were given one name: the second is refused before it has made anything."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    assert draw(folders["grey"], tmp_path / "out", "--batch-size", "0") == 2
    assert partial.is_dir()


def test_settings_say_how_it_was_drawn(folders, tmp_path):
    assert draw(folders["grey"], tmp_path / "out", "--dtype", "bf16", "--device", "cpu") == 0
    records = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert all(record.keys() == {"file", "prompt", "seed", "settings"} for record in records)
    said = records[0]["settings"]
    expected = {"dtype": "bf16", "device": "cpu", "batch_size": 2, "format": "png", "height": 4, "width": 6}
    expected |= {"frames": 1, "steps": 2, "vae_tiling": False, "vae_slicing": False, "seconds": None, "vocoder": None}
    assert expected.items() <= said.items()
