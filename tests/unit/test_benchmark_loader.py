"""`lumina benchmark loader`: the pipelines give the same pictures, and what is said of them is counted right."""

import io
import json
import multiprocessing
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from lumina.benchmark import loader, photographs, pipelines, processes, synthetic
from lumina.benchmark.loader import MemoryRow, SpeedRow
from lumina.cli import main
from lumina.data.index import Index
from lumina.data.sizing import Sizing, Stage
from lumina.parallel.peak_memory import peak_resident_bytes

COUNT = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs.photographs(tmp_path_factory.mktemp("benchmark") / "made", COUNT)


def test_pictures_are_the_same_in_shards_and_files(pictures):
    index = Index.open([pictures.shards])
    assert len(index) == COUNT
    members = [index.read(i) for i in range(COUNT)]
    jpgs = [path.read_bytes() for path in sorted(pictures.files.glob("*.jpg"))]
    assert [m["jpg"] for m in members] == jpgs
    assert [m["txt"].decode() for m in members] == [p.read_text() for p in sorted(pictures.files.glob("*.txt"))]
    assert len(set(jpgs)) == COUNT, "they differ"
    assert pictures.bytes == sum(map(len, jpgs))
    sizes = [Image.open(io.BytesIO(jpg)).size for jpg in jpgs]
    assert len(set(sizes)) == 6
    assert all(0.95 < width * height / 2**20 < 1.05 for width, height in sizes)


def test_pictures_are_made_of_the_photographs():
    """The upper left piece of a picture is a piece of a photograph, at its own scale, as far as JPEG leaves it so."""
    piece = np.asarray(Image.open(io.BytesIO(photographs.photograph(0))), np.float32)[:24, :24]
    best = min(
        float(np.abs(window - piece).mean())
        for source in photographs._sources()
        for way in (source, source[:, ::-1])
        for window in near(way.astype(np.float32), piece)
    )
    assert best < 6


def near(source, piece):
    """The windows of `source` whose corners are about those of `piece`."""
    windows = np.lib.stride_tricks.sliding_window_view(source, (24, 24, 3))[:, :, 0]
    corners = windows[:, :, ::12, ::12]
    distance = np.abs(corners - piece[::12, ::12]).mean((2, 3, 4))
    return windows[np.unravel_index(np.argsort(distance, axis=None)[:20], distance.shape)]


def one_epoch(name, pictures, resolution=64):
    found, taken = {}, 0
    for batch in pipelines.PIPELINES[name](pictures, resolution, 0):
        found |= {caption: pixels for pixels, caption in batch}
        taken += len(batch)
        if len(found) == COUNT or taken > 4 * COUNT:
            return found


def test_pipelines_give_the_same(pictures):
    """Of square pictures nothing is cut away, so that even the pixels are nearly the same; of others, the sizes."""
    found = {name: one_epoch(name, pictures) for name in pipelines.PIPELINES}
    captions = {photographs.caption(number) for number in range(COUNT)}
    square = {photographs.caption(number) for number in range(0, COUNT, len(photographs.SIZES))}
    for name, given in found.items():
        assert set(given) == captions, name
        for caption, pixels in given.items():
            ours = found["lumina"][caption]
            assert (pixels.shape, pixels.dtype) == (ours.shape, torch.float32), f"{name}, {caption}"
            assert -1 <= pixels.min() < -0.5
            assert 0.5 < pixels.max() <= 1
            if caption in square:
                assert psnr(pixels, ours) > 30, f"{name}, {caption}"
    assert len({pixels.shape for pixels in found["files"].values()}) == 5


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def test_random_parts_are_cut(pictures):
    wide = Image.open(pictures.files / "000005.jpg")
    assert wide.width > wide.height
    views = [pipelines.plain_transform(wide, 64) for _ in range(12)]
    assert len({view.numpy().tobytes() for view in views}) > 1


def test_a_run_is_measured(pictures, monkeypatch):
    monkeypatch.setattr(loader, "AT_ONCE", 16)
    row = loader.measured_speed("files", pictures, 64, 0, 3, 33)
    assert (row.pipeline, row.workers, row.repetition, row.pictures) == ("files", 0, 3, 48)  # in batches of 16
    assert 0 < row.cpu_seconds <= 1.5 * row.seconds
    assert row.resident_bytes >= row.proportional_bytes > 50 * 2**20


def burn(seconds, done):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    done.wait()


@pytest.mark.parametrize("waits", [True, False], ids=["living", "ended"])
def test_time_of_children_counts(waits):
    context = multiprocessing.get_context("fork")
    done = context.Event()
    before = processes.cpu_seconds()
    child = context.Process(target=burn, args=(0.4, done), daemon=True)
    if not waits:
        done.set()
    child.start()
    child.join(0.1 if waits else None)
    limit = time.monotonic() + 600
    while processes.cpu_seconds() - before < 0.38 and time.monotonic() < limit:
        time.sleep(0.02)
    assert processes.cpu_seconds() - before >= 0.38
    done.set()
    child.join()


def test_memory_of_children_counts():
    code = "x = bytearray(200 * 2**20); print('held', flush=True); input()"
    before = processes.memory()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    during = processes.memory()
    own = psutil.Process(child.pid).memory_full_info()  # less than it has asked for, where the system swaps
    child.communicate(b"\n")
    for one, other, held in zip(before, during, (own.rss, own.pss), strict=True):
        assert abs(other - one - held) < 30 * 2**20
    assert own.swap + own.pss > 195 * 2**20
    assert processes.memory().resident < during.resident - own.rss + 30 * 2**20


def test_a_fresh_process_does_not_inherit_the_peak():
    ballast = np.ones(2**26)  # 512 MiB
    assert peak_resident_bytes() > ballast.nbytes
    assert processes.in_fresh_process(peak_resident_bytes) < ballast.nbytes


def test_speed_table():
    rows = [
        SpeedRow(name, 1, i, 100, float(seconds), cpu, 3 * 2**20, 2**20)
        for name, of in {"lumina": ((1, 0.5), (2, 1.0), (9, 9.0)), "files": ((4, 4.0), (2, 2.0), (5, 5.0))}.items()
        for i, (seconds, cpu) in enumerate(of)
    ]
    ours, files = loader.speed_table(rows).splitlines()[2:]
    cells = [cell.strip() for cell in files.strip("|").split("|")]
    assert cells == ["1", "files", "25.0", "20.0 – 50.0", "4.00×", "25.0", "2.00×", "3", "1"]
    assert [cell.strip() for cell in ours.strip("|").split("|")][2:5] == ["100.0", "11.1 – 200.0", "1.00×"]


def test_slope_of_the_second_half_is_said():
    """A rise while it starts does not count; RSS then grows by 6 MiB a minute, PSS not."""
    rows = [
        MemoryRow(5.0 * i, i, 2**20 * (500 + 20 * min(i, 8)) + int(2**19 * max(i - 8, 0)), 2**20 * 300)
        for i in range(24)
    ]
    said = loader.memory_said(rows)
    assert "slopes over the second half +6.000 and +0.000 MiB a minute" in said
    assert f"Peaks of RSS and PSS {660 + 7.5} and 300.0 MiB" in said
    assert loader.memory_said(rows[:4]).endswith("too short for a slope.")


def test_memory_is_watched(pictures, monkeypatch):
    """On a clock of its own: two seconds for three pictures, a look at least every five seconds."""
    now = [100.0]

    def stream(*_):
        while True:
            now[0] += 2.0
            yield [()] * 3

    monkeypatch.setitem(pipelines.PIPELINES, "lumina", stream)
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loader.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(loader, "AT_ONCE", 3)
    rows = loader.measured_memory(pictures, 64, 0, 21.0)
    assert [(row.seconds, row.pictures) for row in rows] == [(0.0, 3), (6.0, 12), (12.0, 21), (18.0, 30)]


def test_synthetic_indexes(tmp_path):
    """Read back: every sample once, contents as the columns have them, members one after another within the shard."""
    synthetic.write_indexes(tmp_path / "s", 25_001)
    index = Index.open([tmp_path / "s"], build_missing=False)
    assert [len(header) for header in index.shards] == [10_000, 10_000, 5_001]
    height, width = index.column("height"), index.column("width")
    sizes, counts = np.unique(np.stack((height, width)), axis=1, return_counts=True)
    assert np.array_equal(np.stack((index.contents.shapes.height, index.contents.shapes.width)), sizes)
    assert np.array_equal(index.contents.counts, counts)
    assert index.key(25_000) == "000025000"
    assert len(counts) > 10_000, "sizes hardly repeat"
    assert (np.maximum(height, width) <= 2 * np.minimum(height, width) + 2).all()
    table = index.reader.table(0)
    at = 0
    for row in range(3):
        for extension, offset, size, _ in table.members(row):
            assert extension in ("jpg", "json", "txt")
            assert offset == at + 512
            at = offset + -(-size // 512) * 512
    last = index.reader.table(2).members(5_000)[-1]
    assert last[1] + last[2] <= index.shards[2].shard_size == (tmp_path / "s/synthetic-000002.tar").stat().st_size


def test_index_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "FURTHER_BATCHES", 1)
    monkeypatch.setattr(synthetic, "PACKS", 8)
    synthetic.write_indexes(tmp_path / "s", 12_000)
    row = synthetic.measured_index(tmp_path / "s")
    assert (row.samples, row.shards, row.all_usable) == (12_000, 2, True)
    index = Index.open([tmp_path / "s"])
    plan = pipelines.plan_of(index, Sizing(16, (Stage(0, 256),)), 4096, 8, 2048)
    assert row.first_batch_samples == sum(map(len, plan.batch(plan.start(index.hash))[0]))
    assert row.first_batch_samples * 256 > 8 * 4096 * 0.9
    assert "12,000 samples of " in loader.index_table([row])


def test_verb(pictures, tmp_path, monkeypatch, capsys):
    # In this process: a fresh one takes seconds to import torch.
    monkeypatch.setattr(loader, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(loader.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(loader, "AT_ONCE", 1)
    monkeypatch.setattr(pipelines, "AT_ONCE", 4)
    monkeypatch.setattr(photographs, "_make", lambda *_: pytest.fail("what is there is made again"))
    folder = pictures.files.parent.parent
    out = tmp_path / "numbers.json"
    options = ["--images", str(COUNT), "--dir", str(folder), "--resolution", "32", "--workers", "0"]
    assert main(["benchmark", "loader", *options, "--repeats", "2", "--samples", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert [(row["pipeline"], row["repetition"]) for row in content["rows"]] == [
        *(("lumina", 0), ("webdataset", 0), ("files", 0)),
        *(("files", 1), ("lumina", 1), ("webdataset", 1)),
    ]
    assert {"webdataset", "pillow", "torch"} <= content["packages"].keys()
    assert "| 0       | webdataset |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--images", "3"], "--images 3: it is at least 16"),
        (["--resolution", "100"], "--resolution 100 is not a multiple of 16"),
        (["--workers", "0", "17"], "--workers 17: from 0 to 16"),
        (["--minutes", "0"], "--minutes 0.0: it is above 0"),
        (["--minutes", "nan"], "--minutes nan: it is above 0"),
        (["--index", "0"], "--index 0: it is at least 1"),
        (["--repeats", "0"], "--repeats 0: it is at least 1"),
        (["--out", "nowhere/x.json"], "there is no folder"),
        (["--images", "20", "--dir", "{tmp}/taken"], "was not made by this version"),
        (["--index", "20", "--dir", "{tmp}/taken"], "is there and was not made"),
        (["--images", "20", "--dir", "{tmp}/file"], "cannot be written to"),
    ],
)
def test_refused_in_one_sentence(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photographs, "_make", lambda *_: pytest.fail("made before it was refused"))
    for name in ("photographs-20", "synthetic-20"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    assert main(["benchmark", "loader", *(option.format(tmp=tmp_path) for option in options)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_pictures_are_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(photographs, "_make", broken)
    with pytest.raises(OSError, match="full"):
        photographs.photographs(tmp_path, 20)
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "_loaded", [])
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"pip install 'lumina-t2x\[test\]'"):
        photographs.photographs(tmp_path, 20)
    assert list(tmp_path.iterdir()) == []
