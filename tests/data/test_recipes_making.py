"""Equal inputs give equal bytes under any number of processes, and after a kill at any time."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.order import permutation, random_words
from lumina.data.recipes import making
from lumina.data.recipes.folder import folder_to_shards
from lumina.data.recipes.making import Layout, parse_bytes
from tests.data.pictures import captioned, digit_png, files, members

LAYOUT = Layout(samples_per_shard=3, workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return captioned(tmp_path_factory.mktemp("source") / "src", 40, classes=4)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    folder_to_shards(source, out, layout=LAYOUT)
    return files(out)


def test_the_bytes_do_not_depend_on_the_workers(source: Path, unbroken: dict, tmp_path: Path) -> None:
    seen = []
    folder_to_shards(
        source,
        tmp_path / "out",
        layout=Layout(samples_per_shard=3, workers=3),
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert files(tmp_path / "out") == unbroken
    assert len(unbroken) == 28
    total = sum(len(content) for name, content in unbroken.items() if name.endswith(".tar"))
    assert seen[0] == ("writing", 0, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_shards_are_filled_up_to_their_size(source: Path, tmp_path: Path) -> None:
    for size in (10240, 20480, 55_000, 1 << 30):
        out = tmp_path / str(size)
        folder_to_shards(source, out, layout=Layout(shard_size=size, workers=1))
        shards = sorted(out.glob("*.tar"))
        sizes = [shard.stat().st_size for shard in shards]
        assert max(sizes) <= size
        counts = [len(content) for content in members(out).values()]
        assert sum(counts) == 80
        # The first sample of each shard would not have fitted into the one before: 4 blocks a sample, 2 at the end.
        for count, before in zip(counts[1:], counts[:-1], strict=False):
            assert (before // 2 + 1) * 4 * 512 + 1024 > size // 10240 * 10240, count


def test_a_large_sample_has_a_shard_to_itself(tmp_path: Path) -> None:
    source = captioned(tmp_path / "src", 4, classes=1)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "c 0" / "d001.v2.png")
    folder_to_shards(source, tmp_path / "out", layout=Layout(shard_size=10240, workers=1))
    assert [len(content) // 2 for content in members(tmp_path / "out").values()] == [1, 1, 2]
    for seed in range(8):
        out = tmp_path / f"shuffled {seed}"
        folder_to_shards(source, out, layout=Layout(shard_size=10240, shuffle=seed, workers=1))
        before = permutation(random_words(4, "shards", seed)).tolist().index(1)
        counts = [len(content) // 2 for content in members(out).values()]
        assert counts == [count for count in (before, 1, 3 - before) if count]


def test_shuffled_over_all_folders(source: Path, tmp_path: Path) -> None:
    def keys(**options) -> list[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        folder_to_shards(source, out, layout=Layout(samples_per_shard=10, workers=1, **options))
        return [name.removesuffix(".png") for shard in members(out).values() for name, _ in shard if "png" in name]

    ordered, shuffled = keys(), keys(shuffle=5)
    assert shuffled == [ordered[i] for i in permutation(random_words(40, "shards", 5))]
    assert shuffled == keys(shuffle=5) != keys(shuffle=6) != ordered
    assert len({key.split("/")[0] for key in shuffled[:10]}) > 1 == len({key.split("/")[0] for key in ordered[:10]})


def descendants(pid: int) -> set[int]:
    found, parents = {pid}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


# The command, which stands still once nine lines of its journal are written: what is killed then is in the middle.
IN_THE_MIDDLE = """
import sys, time
from lumina.cli import main
from lumina.data.recipes import making

if __name__ == "__main__":
    note, noted = making._Journal.note, []

    def stopping(self, job):
        note(self, job)
        noted.append(job)
        if len(noted) == 8:
            print("here", flush=True)
            time.sleep(1200)

    making._Journal.note = stopping
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_and_gone_on_with(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = captioned(tmp_path / "src", 40)
    out, work = tmp_path / "out", tmp_path / ".out.making"
    options = ["--samples-per-shard", "1", "--workers", "2"]
    script = tmp_path_factory.mktemp("script") / "in_the_middle.py"
    script.write_text(IN_THE_MIDDLE)
    command = [sys.executable, script, "data", "folder", source, out, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
    journal = work / "journal.jsonl"
    assert process.stdout.readline() == "here\n"
    children = descendants(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not out.exists()
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive the process that was killed"
        time.sleep(0.01)

    with journal.open("a") as stream:
        stream.write('{"shard": "set/out-000039')  # a line torn by the kill
    finished = [line.split('"')[3] for line in journal.read_text().splitlines()[1:-1]]
    assert len(finished) == 8
    before = {name: (work / name).stat().st_mtime_ns for name in finished}
    layout = Layout(samples_per_shard=1, workers=1)
    for other, words in (
        ({"layout": Layout(samples_per_shard=2)}, "begun with samples_per_shard=1, now samples_per_shard=2; repeat"),
        ({"caption_from": "name"}, "begun with caption-from=file, now caption-from=name"),
        ({"layout": Layout(samples_per_shard=1, shuffle=1)}, "begun with shuffle=None, now shuffle=1"),
    ):
        with pytest.raises(ValueError, match=words):
            folder_to_shards(source, out, **({"layout": layout} | other))
    folder_to_shards(source, out, layout=layout)
    assert {name: (out / Path(name).name).stat().st_mtime_ns for name in finished} == before
    assert {path.name for path in tmp_path.iterdir()} == {"src", "out"}
    folder_to_shards(source, tmp_path / "again" / "out", layout=layout)
    assert files(out) == files(tmp_path / "again" / "out")


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Make shards until `after` are finished, then fail."""
    write, calls = making.write_shard, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return write(*arguments)

    monkeypatch.setattr(making, "write_shard", failing)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        folder_to_shards(source, out, layout=LAYOUT)
    monkeypatch.setattr(making, "write_shard", write)


def test_after_a_failure_finished_shards_are_kept(
    source: Path, unbroken: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after, error in ((0, KeyboardInterrupt()), (4, KeyboardInterrupt()), (2, OSError(28, "No space left"))):
        out = tmp_path / "out"
        interrupted(source, out, monkeypatch, after, error)
        assert not out.exists()
        assert (tmp_path / ".out.making").exists() == (after > 0)
        # What was finished is lost or cut: it is written again.
        if after > 2:
            (tmp_path / ".out.making/set/out-000001.tar").unlink()
            (tmp_path / ".out.making/set/.out-000004.index.safetensors.part").write_text("left by a kill")
        folder_to_shards(source, out, layout=LAYOUT)
        assert files(out) == unbroken
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


def test_a_source_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = captioned(tmp_path / "src", 12)
    first = source / "c 0" / "d000.v2.txt"
    for change in (lambda: first.write_text("other"), lambda: digit_png(99, source / "c 0" / "d000.v2.png")):
        interrupted(source, tmp_path / "out", monkeypatch, 2, KeyboardInterrupt())
        change()
        with pytest.raises(ValueError, match=r"changed since the shards were begun; delete .*\.out\.making"):
            folder_to_shards(source, tmp_path / "out", layout=LAYOUT)
        shutil.rmtree(tmp_path / ".out.making")
    plan_add = making._Plan.__exit__

    def and_change(*arguments):
        plan_add(*arguments)
        os.utime(source / "c 0" / "d000.v2.png")  # the same bytes, for all that can be told without reading them

    monkeypatch.setattr(making._Plan, "__exit__", and_change)
    with pytest.raises(ValueError, match=r"d000.v2.png changed while shards were made of it"):
        folder_to_shards(source, tmp_path / "out", layout=LAYOUT)


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.making").mkdir()
    with (tmp_path / ".out.making" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing these shards now"):
            folder_to_shards(source, tmp_path / "out", layout=LAYOUT)
    folder_to_shards(source, tmp_path / "out", layout=LAYOUT)


def test_the_disk_is_measured_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 100_000))
    with pytest.raises(ValueError, match=r"has 100,000 bytes free, and the shards need \d\d\d,\d\d\d; free some"):
        folder_to_shards(source, tmp_path / "out", layout=LAYOUT)
    assert not any(tmp_path.iterdir())


def test_an_unwritable_folder_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="shards cannot be written to"):
            folder_to_shards(source, out, layout=LAYOUT)


def test_nothing_appears_unless_every_shard_is_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "run_jobs", lambda *_: iter(()))
    with pytest.raises(ValueError, match="No such file"):
        folder_to_shards(source, tmp_path / "out", layout=LAYOUT)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "count"),
    [("10240", 10240), ("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5k", 1500), ("3Ti", 3 << 40), ("7b", 7)],
)
def test_numbers_of_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "1 GB B", "-5", "1e9", "1.G", "2PiB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of bytes"):
        parse_bytes(text)
