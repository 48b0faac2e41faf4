"""Every damage is found and named, nothing is found in good shards, and checking changes nothing."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.check import check_shards
from lumina.data.find import find_shards
from lumina.data.recipes.folder import folder_to_shards
from lumina.data.recipes.making import Layout
from lumina.data.shard_index import index_path
from lumina.data.write import write_shards
from tests.data.pictures import captioned, digit_png, files


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    source = captioned(folder / "src", 24, classes=1)
    folder_to_shards(source, folder / "set", layout=Layout(samples_per_shard=4, workers=1))
    return folder / "set"


@pytest.fixture
def shards(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "set"))


def shard(folder: Path, number: int) -> Path:
    return folder / f"set-{number:06d}.tar"


def place(path: Path, member: str) -> tuple[int, int]:
    """Offset and size of a member's content."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
        return info.offset_data, info.size


def change(path: Path, at: int, new: bytes) -> None:
    """Overwrite bytes; the date stays, as it does when a disk does it."""
    date = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(new)
    os.utime(path, ns=(date, date))


def found(folder: Path, **options) -> list[tuple[str, str, str, int, tuple[str, ...]]]:
    report = check_shards([folder], **({"workers": 1} | options))
    assert all(problem.mend for problem in report.problems)
    assert report.errors == sum(problem.level == "error" for problem in report.problems)
    return [(p.level, p.where, p.what, p.count, p.named) for p in report.problems]


@pytest.mark.parametrize(("decode", "workers"), [(False, 1), (True, 1), (True, 2)])
def test_good_shards(shards: Path, decode: bool, workers: int) -> None:
    before, seen = files(shards), []
    report = check_shards([shards], decode=decode, workers=workers, progress=lambda *numbers: seen.append(numbers))
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert (report.problems, report.shards, report.samples, report.bytes) == ((), 6, 24, size)
    assert report.as_text() == f"24 samples in 6 shards ({size:,} bytes) checked; nothing is wrong"
    assert files(shards) == before
    assert seen[-1] == (size * (1 + decode),) * 2


def test_a_flipped_byte_in_a_picture_and_in_a_caption(shards: Path) -> None:
    for number, member in ((1, "c_0/d005_v2.png"), (1, "c_0/d006_v2.txt"), (2, "c_0/d008_v2.png")):
        change(shard(shards, number), place(shard(shards, number), member)[0], b"\xff")
    assert found(shards) == [
        ("error", "set-000001.tar", "members that fail their CRC32", 2, ("c_0/d005_v2.png", "c_0/d006_v2.txt")),
        ("error", "set-000002.tar", "members that fail their CRC32", 1, ("c_0/d008_v2.png",)),
    ]


def test_a_damaged_header_and_what_lies_behind_it(shards: Path) -> None:
    damaged = shard(shards, 1)
    change(damaged, place(damaged, "c_0/d007_v2.txt")[0], b"x")
    change(damaged, place(damaged, "c_0/d005_v2.png")[0] - 512 + 20, b"x")
    (header, members) = found(shards)
    assert header[:2] == members[:2] == ("error", "set-000001.tar")
    assert header[2].startswith("is damaged at byte ")
    assert "after c_0/d004_v2.txt: the header is damaged" in header[2]
    assert members[2:] == ("members that fail their CRC32", 1, ("c_0/d007_v2.txt",))


def test_a_header_that_was_changed_well(shards: Path) -> None:
    path = shard(shards, 0)
    offset, _ = place(path, "c_0/d001_v2.txt")
    with tarfile.open(path) as tar:
        info = tar.getmember("c_0/d001_v2.txt")
    info.mode = 0o600
    change(path, offset - 512, info.tobuf(tarfile.USTAR_FORMAT))
    ((level, where, what, *_),) = found(shards)
    assert (level, where) == ("error", "set-000000.tar")
    assert what == "its SHA-256 is not that of its index, though all members are"


def test_a_hole_and_a_cut(shards: Path) -> None:
    change(shard(shards, 0), 2048, bytes(1024))
    cut = shard(shards, 3)
    size = cut.stat().st_size
    date = cut.stat().st_mtime_ns
    os.truncate(cut, place(cut, "c_0/d014_v2.txt")[0] + 512)
    os.utime(cut, ns=(date, date))
    problems = found(shards)
    assert [problem[:2] for problem in problems[1:]] == [("error", "set-000003.tar")] * 2 or len(problems) == 4
    text = [problem[2] for problem in problems if problem[1] == "set-000003.tar"]
    assert text[0] == f"it has {cut.stat().st_size:,} bytes, its index says {size:,}"
    assert "the shard is truncated" in text[1]
    assert any("hole of zeros" in problem[2] for problem in problems if problem[1] == "set-000000.tar")


def test_a_shard_of_another_content(shards: Path, tmp_path: Path) -> None:
    source = captioned(tmp_path / "other", 24, classes=1)
    for path in source.rglob("*.txt"):
        path.rename(path.with_name(path.name.replace("d", "e", 1)))
    for path in source.rglob("*.png"):
        path.rename(path.with_name(path.name.replace("d", "e", 1)))
    folder_to_shards(source, tmp_path / "new" / "set", layout=Layout(samples_per_shard=4, workers=1))
    other = shard(tmp_path / "new" / "set", 2)
    assert other.stat().st_size == shard(shards, 2).stat().st_size
    date = shard(shards, 2).stat().st_mtime_ns
    shutil.copyfile(other, shard(shards, 2))
    os.utime(shard(shards, 2), ns=(date, date))
    problems = found(shards)
    assert problems[0][:3] == (
        "error",
        "set-000002.tar",
        "its index describes other members, from c_0/e008_v2.png on",
    )


def test_missing_shards_are_all_named(shards: Path) -> None:
    shard(shards, 1).unlink()
    index_path(shard(shards, 1)).unlink()
    shard(shards, 3).unlink()
    index_path(shard(shards, 3)).unlink()
    shard(shards, 5).unlink()  # the last: known by its index alone
    expected = ("error", "2", "missing shards", 3, ("set-000001.tar", "set-000003.tar", "set-000005.tar"))
    (problem,) = found(shards)
    assert problem[2:] == expected[2:]
    assert problem[1] == str(shards)
    (named,) = check_shards([shards / "set-00000[45].tar"], workers=1).problems
    assert named.named == ("set-000005.tar",)
    (named,) = check_shards([shard(shards, 4), shard(shards, 5)], workers=1).problems
    assert (named.where, named.named) == (str(shards), ("set-000005.tar",))
    (named,) = check_shards([f"{shards}/set-{{000002,000005}}.tar"], workers=1).problems
    assert named.named == ("set-000005.tar",)
    assert check_shards([shard(shards, 4)], workers=1).problems == ()


def test_without_an_index_with_an_old_one_and_with_a_broken_one(shards: Path) -> None:
    index_path(shard(shards, 0)).unlink()
    later = time.time_ns() + 10**9
    for number in (1, 2):
        os.utime(shard(shards, number), ns=(later, later))
    offset, _ = place(shard(shards, 2), "c_0/d009_v2.png")
    with shard(shards, 2).open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff")
    os.utime(shard(shards, 2), ns=(later, later))
    change(index_path(shard(shards, 3)), 2000, b"\xff\xff\xff\xff\xff")
    before = files(shards)
    assert [problem[:3] for problem in found(shards)] == [
        ("error", "set-000002.tar", "members that fail their CRC32"),
        ("error", "set-000003.tar", "its index is damaged or of another version"),
        ("warning", "set-000000.tar", "it has no index, so that only its form could be checked"),
        (
            "warning",
            "set-000001.tar",
            "the index is older than the shard, but describes it; training would build it anew",
        ),
    ]
    assert files(shards) == before
    change(shard(shards, 0), 10, b"x")
    assert found(shards)[0][1] == "set-000000.tar"
    assert "the header is damaged" in found(shards)[0][2]


def test_one_shard_twice(shards: Path) -> None:
    for path in (shard(shards, 1), index_path(shard(shards, 1))):
        shutil.copy2(path, path.with_name(path.name.replace("000001", "000006")))
    assert found(shards) == [("error", "set-000006.tar", "it holds the same bytes as set-000001.tar", 1, ())]


def png(path: Path) -> bytes:
    return path.read_bytes()


def test_repeated_keys_and_contents(tmp_path: Path) -> None:
    pictures = [png(digit_png(number, tmp_path / f"{number}.png")) for number in range(40)]
    names = [*(f"k{number:02d}" for number in range(30)), "k03", "k04", *(f"n{number:02d}" for number in range(14))]
    # k03 comes again with its picture, k04 with another; n00 … n11 hold the pictures of k05 … k16, n12 and n13 one.
    content = [*range(30), 3, 31, *range(5, 17), 38, 38]
    samples = (
        {"__key__": name, "png": pictures[number], "txt": f"caption of {place}"}
        for place, (name, number) in enumerate(zip(names, content, strict=True))
    )
    write_shards(tmp_path / "set", samples, name="a", samples_per_shard=10)
    keys, contents = check_shards([tmp_path / "set"], workers=1).problems
    assert (keys.level, keys.what, keys.count) == ("warning", "keys in more than one shard", 2)
    assert keys.named == ("k03 (a-000003.tar) = k03 (a-000000.tar)", "k04 (a-000003.tar) = k04 (a-000000.tar)")
    assert (contents.level, contents.count, len(contents.named)) == ("warning", 13, 10)
    assert contents.named[0] == "n00 (a-000003.tar) = k05 (a-000000.tar)"
    assert contents.named[9] == "n09 (a-000004.tar) = k14 (a-000001.tar)"


def test_empty_captions_and_pictures_that_do_not_decode(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    small = [png(digit_png(number, tmp_path / f"{number}.png")) for number in range(2)]
    samples = [
        {"__key__": "good", "png": small[0], "txt": "a"},
        {"__key__": "empty", "png": small[1], "txt": " \n"},
        {"__key__": "half", "png": half, "txt": "b"},
        {"__key__": "none", "png": b"nothing", "txt": "c"},
        {"__key__": "latin", "png": whole.getvalue(), "txt": b"\xe9"},
    ]
    write_shards(tmp_path / "set", samples, name="a", samples_per_shard=10)
    captions = ("warning", "a-000000.tar", "captions that are empty or do not read", 2, ("empty", "latin"))
    header = ("error", "a-000000.tar", "samples whose header does not read", 1, ("none",))
    assert found(tmp_path / "set") == [header, captions]
    (failed, *rest) = found(tmp_path / "set", decode=True)
    assert rest == [captions]
    assert failed[:4] == ("error", "a-000000.tar", "samples that do not decode", 3)
    assert [name.partition(" (")[0] for name in failed[4]] == ["half", "none", "latin"]
    assert failed[4][2] == "latin (caption is not UTF-8 (byte 0))"


def test_labels_that_do_not_read(tmp_path: Path) -> None:
    pictures = [png(digit_png(number, tmp_path / f"{number}.png")) for number in range(3)]
    fields = (b'{"label": 1}', b'{"label": -1}', b"{")
    samples = [{"__key__": f"{n}", "png": pictures[n], "json": text} for n, text in enumerate(fields)]
    write_shards(tmp_path / "set", samples, name="a", samples_per_shard=10)
    what = "samples whose .json, or the label in it, does not read"
    assert found(tmp_path / "set") == [("error", "a-000000.tar", what, 2, ("1", "2"))]
    ((*failed, names),) = found(tmp_path / "set", decode=True)
    assert failed == ["error", "a-000000.tar", "samples that do not decode", 2]
    assert [name.partition(" (")[0] for name in names] == ["1", "2"]


def test_bad_arguments(shards: Path) -> None:
    for pattern in (shards / "none", shards / "*.zip", shards.parent / "nowhere" / "*.tar"):
        with pytest.raises(ValueError, match=r"data\.shards: .* (is missing|matches no \.tar file)"):
            check_shards([pattern], workers=1)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        check_shards([shards], workers=0)
    with pytest.raises(ValueError, match=r"^https://host/a.tar is no local file; copy the shards here"):
        check_shards(["https://host/a.tar"], workers=1)
    (shards / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.npy is no shard; make shards of such files with `lumina data folder`"):
        check_shards([shards / "a.npy"], workers=1)


def test_a_folder_of_folders(shards: Path, tmp_path: Path) -> None:
    for name in ("b", "a/deep", ".a.making/set"):
        shutil.copytree(shards, tmp_path / "out" / name)
    for name in ("b", "a/deep"):
        for number in range(3) if name == "b" else range(3, 6):
            shard(tmp_path / "out" / name, number).unlink()
            index_path(shard(tmp_path / "out" / name, number)).unlink()
    shard(tmp_path / "out" / "b", 3).rename(tmp_path / "out" / "b" / "set-000000.tar")
    index_path(shard(tmp_path / "out" / "b", 3)).rename(index_path(tmp_path / "out" / "b" / "set-000000.tar"))
    (tmp_path / "out" / "empty").mkdir()
    change(shard(tmp_path / "out" / "b", 0), place(shard(tmp_path / "out" / "b", 0), "c_0/d013_v2.png")[0], b"\xff")
    report = check_shards([tmp_path / "out"], workers=1)
    assert (report.shards, report.samples) == (6, 24)
    assert [(problem.where, problem.what, problem.named) for problem in report.problems] == [
        (str(tmp_path / "out" / "b"), "missing shards", ("set-000001.tar", "set-000002.tar", "set-000003.tar")),
        ("b/set-000000.tar", "members that fail their CRC32", ("c_0/d013_v2.png",)),
    ]
    # Training is told which folders it means.
    message = rf"{tmp_path}/out matches no .tar file; name the folders in it that hold some: \S*/out/a/deep, \S*/out/b$"
    with pytest.raises(ValueError, match=message):
        find_shards([tmp_path / "out"])
    with pytest.raises(ValueError, match=r"empty matches no .tar file$"):
        check_shards([tmp_path / "out" / "empty"], workers=1)


def test_the_command(shards: Path) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        code = "import sys; from lumina.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "data", "check", str(shards), "--workers", "1", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout, done.stderr

    change(shard(shards, 1), place(shard(shards, 1), "c_0/d005_v2.png")[0], b"\xff")
    index_path(shard(shards, 0)).unlink()
    code, out, err = run()
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        "error",
        "set-000001.tar",
        "members",
        "that",
        "fail",
        "their",
        "CRC32:",
        "c_0/d005_v2.png",
    ]
    assert lines[1].split()[:4] == ["mend", "copy", "the", "shard"]
    assert lines[-1].endswith("checked; errors: 1, warnings: 1")
