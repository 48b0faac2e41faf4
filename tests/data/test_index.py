"""The index: what it holds, and that every damage of a shard is found and named."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.decode import BadSampleError
from lumina.data.index import Index, build_index, find_shards, index_path, index_shards
from lumina.data.write import write_shards


def member_at(shard: Path, name: str) -> tuple[int, int]:
    """(offset of the header, offset of the content) in bytes."""
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    """Change bytes without a trace in size or time, as a failing disk does."""
    times = shard.stat()
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(shard: Path, offset: int) -> None:
    overwrite(shard, offset, bytes([shard.read_bytes()[offset] ^ 4]))


def close_tar(shard: Path, offset: int) -> None:
    """Cut at `offset` and end properly."""
    data = shard.read_bytes()[:offset] + bytes(1024)
    shard.write_bytes(data + bytes(-len(data) % 10240))


def tar_of(path: Path, members: list[tuple[str, bytes]], **info: object) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for field, value in info.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def shard(make_shards) -> Path:
    """One shard of 12 samples without an index."""
    shard = make_shards(12) / "a-000000.tar"
    index_path(shard).unlink()
    return shard


def test_columns_and_contents(make_shards, make_sample) -> None:
    index = Index.open([make_shards(12, per_shard=5)])
    assert len(index) == 12
    assert [path.name for path in index.reader.shards] == ["a-000000.tar", "a-000001.tar", "a-000002.tar"]
    assert index.heights.tolist()[:5] == [8, 8, 16, 12, 4]
    assert index.widths.tolist()[:5] == [8, 12, 8, 12, 20]
    assert set(index.frames.tolist()) == {1}
    assert index.labels.tolist()[:4] == [0, 1, 2, 0]
    assert index.caption_lengths.tolist()[:2] == [12, 12]
    for number in range(12):
        expected = make_sample(number)
        members = index.read(number)
        assert index.key(number) == expected["__key__"]
        assert sorted(members) == ["json", "png", "txt"]
        assert members["png"] == expected["png"]
        assert members["txt"].decode() == expected["txt"]
    assert index.name(7) == "sample s0007 of a-000001.tar"
    with pytest.raises(ValueError, match="no sample 12; the data set has samples 0 to 11"):
        index.read(12)


def test_hash_is_of_the_content_not_of_order_or_folder(make_shards, tmp_path: Path) -> None:
    folder = make_shards(12, per_shard=5)
    tars = [str(folder / f"a-00000{n}.tar") for n in range(3)]
    index = Index.open(tars)
    assert len(index.hash) == 64
    assert Index.open([tars[2], *tars]).hash == index.hash
    assert Index.open([tars[2], tars[0], tars[1]]).read(0) == index.read(0)
    folder.rename(tmp_path / "elsewhere")
    assert Index.open([tmp_path / "elsewhere" / "*.tar"]).hash == index.hash
    assert Index.open([tmp_path / "elsewhere" / "a-00000[01].tar"]).hash != index.hash
    assert Index.open([make_shards(12, per_shard=5, name="b")]).hash != index.hash


def test_equal_names_in_two_folders_sort_by_content(make_sample, tmp_path: Path) -> None:
    for folder, first in (("x", 0), ("y", 10)):
        samples = [make_sample(n) for n in range(first, first + 3)]
        write_shards(tmp_path / folder / "d", samples, name="a", samples_per_shard=9)
    before = Index.open([tmp_path / "x/d", tmp_path / "y/d"])
    keys = [before.key(n) for n in range(6)]
    (tmp_path / "x").rename(tmp_path / "z")
    after = Index.open([tmp_path / "y/d", tmp_path / "z/d"])
    assert before.hash == after.hash
    assert keys == [after.key(n) for n in range(6)]


def test_a_copied_shard_is_refused(make_shards, tmp_path: Path) -> None:
    folder = make_shards(3)
    (folder / "b-000000.tar").write_bytes((folder / "a-000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"a-000000.tar and .*b-000000.tar hold the same bytes"):
        Index.open([folder])


def test_index_is_rebuilt_when_it_does_not_match(make_shards, make_sample) -> None:
    folder = make_shards(12)
    shard = folder / "a-000000.tar"
    first = Index.open([folder]).hash
    made = index_path(shard).stat().st_mtime_ns
    assert Index.open([folder]).hash == first
    assert index_path(shard).stat().st_mtime_ns == made, "a matching index was rebuilt"
    longer = make_shards(30, name="b") / "b-000000.tar"
    shard.write_bytes(longer.read_bytes())
    os.utime(index_path(shard))
    with pytest.raises(ValueError, match=r"a-000000.tar has no index that matches it; .*lumina data index"):
        Index.open([folder], build_missing=False)
    assert len(Index.open([folder])) == 30
    os.utime(shard, ns=(made + 10**12, made + 10**12))
    with pytest.raises(ValueError, match="no index that matches"):
        Index.open([folder], build_missing=False)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_a_damaged_index_is_rebuilt(make_shards, where: float) -> None:
    folder = make_shards(12)
    path = index_path(folder / "a-000000.tar")
    good = path.read_bytes()
    flip(path, int(len(good) * where))
    assert len(Index.open([folder])) == 12
    assert path.read_bytes() == good


def test_index_shards_reports_progress(make_shards) -> None:
    folder = make_shards(12, per_shard=5)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    seen = []
    assert index_shards([folder], lambda done, of: seen.append((done, of))) == 12
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert index_shards([folder]) == 12


# The seven damages of ANCHORS, of which webdataset 1.0.2 reports one, and a missing shard.


def test_damage_truncated_inside_a_member(shard: Path) -> None:
    _, content = member_at(shard, "s0007.png")
    os.truncate(shard, content + 20)
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*truncated inside s0007.png"):
        build_index(shard)
    assert not index_path(shard).exists()


def test_damage_truncated_between_members(shard: Path) -> None:
    header, _ = member_at(shard, "s0007.json")
    for size in (header + 100, header):
        os.truncate(shard, size)
        with pytest.raises(
            ValueError, match=r"a-000000.tar is damaged.*after s0006.txt.*truncated.*without the end mark"
        ):
            build_index(shard)


def test_damage_end_mark_cut(shard: Path) -> None:
    _, content = member_at(shard, "s0011.txt")
    for size in (content + 1024, content + 512):  # one of the two blocks of the mark, then none
        os.truncate(shard, size)
        with pytest.raises(
            ValueError, match=r"after s0011.txt: the shard is truncated: it ends (inside|without) the end"
        ):
            build_index(shard)


@pytest.mark.parametrize("length", [512, 2048, 6000])
def test_damage_hole_of_zeros(shard: Path, length: int) -> None:
    header, _ = member_at(shard, "s0004.json")
    overwrite(shard, header, bytes(length))
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*after s0003.txt.*hole of zeros"):
        build_index(shard)


def test_damage_tail_of_zeros(shard: Path) -> None:
    header, _ = member_at(shard, "s0000.txt")
    size = shard.stat().st_size
    overwrite(shard, header, bytes(size - header))
    with pytest.raises(ValueError, match=r"after s0000.png: only zeros follow.*was lost"):
        build_index(shard)


@pytest.mark.parametrize("byte", [3, 120, 130, 150, 260])
def test_damage_bit_in_a_header(shard: Path, byte: int) -> None:
    header, _ = member_at(shard, "s0005.png")
    flip(shard, header + byte)
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*after s0005.json.*header is damaged"):
        build_index(shard)


def test_damage_bit_in_a_payload(shard: Path) -> None:
    _, content = member_at(shard, "s0005.txt")
    index = Index.open([shard])
    flip(shard, content + 2)
    index.read(4)
    with pytest.raises(BadSampleError, match=r"\.txt at byte \d+ does not match its CRC"):
        index.read(5)
    os.utime(shard)
    assert Index.open([shard]).hash != index.hash


def test_damage_hole_in_a_caption(shard: Path) -> None:
    from lumina.data.decode import decode

    _, content = member_at(shard, "s0005.txt")
    overwrite(shard, content, bytes(5))
    with pytest.raises(BadSampleError, match="caption holds zero bytes"):
        decode(Index.open([shard]).read(5), channels=1, multiple=4)


def test_damage_cut_between_picture_and_caption(shard: Path) -> None:
    header, _ = member_at(shard, "s0008.txt")
    close_tar(shard, header)
    with pytest.raises(ValueError, match=r"sample s0008 of shard .*a-000000.tar has a picture and no caption"):
        build_index(shard)


def test_damage_cut_before_the_picture(shard: Path) -> None:
    header, _ = member_at(shard, "s0008.png")
    close_tar(shard, header)
    with pytest.raises(ValueError, match=r"sample s0008 of shard .*a-000000.tar has no pictures, only \['json'\]"):
        build_index(shard)


def test_damage_key_twice(make_sample, tmp_path: Path) -> None:
    picture = make_sample(0)["png"]
    members = [(f"{key}.{ext}", picture if ext == "png" else b"x") for key in "aba" for ext in ("png", "txt")]
    with pytest.raises(ValueError, match=r"t.tar holds the key a twice"):
        build_index(tar_of(tmp_path / "t.tar", members))
    members = [("a.png", picture), ("a.txt", b"x"), ("a.txt", b"y")]
    with pytest.raises(ValueError, match=r"sample a of shard .*t.tar has .txt twice"):
        build_index(tar_of(tmp_path / "t.tar", members))


def test_missing_shards_are_named(make_shards) -> None:
    folder = make_shards(12, per_shard=4)
    for missing, pattern in (("a-000002.tar", folder), ("a-000001.tar", folder / "a-*.tar")):
        data = (folder / missing).read_bytes()
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=f"{missing} is missing: its index is there"):
            Index.open([pattern])
        (folder / missing).write_bytes(data)
    (folder / "a-000001.tar").unlink()
    (folder / "a-000001.index.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a-000001.tar is missing \(1 of 3 numbers are\)"):
        Index.open([folder])
    assert len(Index.open([folder / "a-00000[02].tar"])) == 8
    for pattern, message in (
        (folder / "b-000000.tar", "b-000000.tar is missing"),
        (folder / "b-*.tar", r"matches no .tar file"),
        (folder / "none/*.tar", r"matches no .tar file"),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards([pattern])
    with pytest.raises(ValueError, match="missing; give the path of a tar file"):
        build_index(folder / "b-000000.tar")


def test_a_shard_that_goes_while_in_use_is_named(make_shards) -> None:
    folder = make_shards(4)
    index = Index.open([folder])
    (folder / "a-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"a-000000.tar was removed or changed while it was in use"):
        index.read(0)
    (folder / "a-000000.tar").write_bytes((make_shards(4, name="b", bad={1}) / "b-000000.tar").read_bytes())
    index_shards([folder])
    with pytest.raises(ValueError, match=r"a-000000.tar was removed or changed while it was in use"):
        index.read(0)


def test_foreign_tars(make_sample, tmp_path: Path) -> None:
    picture = make_sample(0)["png"]
    long_name = "folder/" + "k" * 150
    members = [(f"{long_name}.png", picture), (f"{long_name}.TXT", b"x"), ("é.png", picture), ("é.txt", b"y")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"t{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), 1.5
                tar.addfile(entry, io.BytesIO(data))
        index = Index.open([path])
        assert [index.key(0), index.key(1)] == [long_name, "é"]
        assert index.read(0) == {"png": picture, "txt": b"x"}
    link = tar_of(tmp_path / "l.tar", [("a.png", b"")], type=tarfile.SYMTYPE, linkname="b.png")
    with pytest.raises(ValueError, match=r"l.tar.*a.png is a link or a device"):
        build_index(link)
    with pytest.raises(ValueError, match=r"README of shard .* not named KEY.EXTENSION"):
        build_index(tar_of(tmp_path / "r.tar", [("README", b"")]))
    with pytest.raises(ValueError, match="holds no samples"):
        build_index(tar_of(tmp_path / "e.tar", []))
    with pytest.raises(ValueError, match="neither caption nor label"):
        build_index(tar_of(tmp_path / "n.tar", [("a.png", picture)]))


def test_labels_alone_are_enough_and_bad_metadata_waits_for_the_loader(make_sample, tmp_path: Path) -> None:
    picture = make_sample(0)["png"]
    index = Index.open([tar_of(tmp_path / "t.tar", [("a.png", picture), ("a.json", b'{"label": 4}')])])
    assert (index.labels.tolist(), index.caption_lengths.tolist()) == ([4], [-1])
    members = [("a.png", b"no picture"), ("a.txt", b"\xff"), ("b.png", picture), ("b.json", b"{")]
    index = Index.open([tar_of(tmp_path / "u.tar", members)])
    assert index.heights.tolist() == [0, 8]
    assert index.caption_lengths.tolist() == [0, 0]


def test_sizes_are_those_after_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    members = []
    for extension, form in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        stream = io.BytesIO()
        Image.new("RGB", (20, 10)).save(stream, form, exif=exif)
        members += [(f"{extension}.{extension}", stream.getvalue()), (f"{extension}.txt", b"x")]
    index = Index.open([tar_of(tmp_path / "t.tar", members)])
    assert index.heights.tolist() == [20] * 3
    assert index.widths.tolist() == [10] * 3


def test_the_index_costs_no_python_object_a_sample(make_shards) -> None:
    index = Index.open([make_shards(50, per_shard=20)])
    columns = (index.heights, index.widths, index.frames, index.caption_lengths, index.labels)
    assert all(isinstance(column, np.ndarray) and column.dtype != object for column in columns)
    assert sum(column.nbytes for column in columns) == 50 * 24


def test_an_index_that_cannot_be_written_is_said(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"index of .*a-000000.tar cannot be written beside it \(No space left"):
        build_index(shard)
    assert [path.name for path in shard.parent.iterdir()] == ["a-000000.tar"]
