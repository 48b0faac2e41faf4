"""The index: what it holds, and that every damage of a shard is found and named."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from lumina.cli import main
from lumina.data import index as index_module
from lumina.data.decode import BadSampleError, View, decode_view
from lumina.data.find import find_shards
from lumina.data.index import Index
from lumina.data.indexing import KIND_OF_EXTENSION, build_index, index_shards
from lumina.data.shard_index import (
    COLUMNS,
    KINDS,
    SAMPLE_COLUMNS,
    DamagedIndexError,
    ShardHeader,
    _histogram,
    index_path,
    index_path_in,
    open_header,
    open_headers,
    open_index,
)
from lumina.data.sources import LocalSource, MissingSourceError, PipeSource, Retry, source_of
from lumina.data.write import write_shards
from tests.data.faulty_http import serving


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


SIZES = ((8, 8), (8, 12), (16, 8), (12, 12), (4, 20))  # of make_shards' pictures, one after another


@pytest.fixture
def shard(make_shards) -> Path:
    """One shard of 12 samples without an index."""
    shard = make_shards(12) / "a-000000.tar"
    index_path(shard).unlink()
    return shard


def test_columns_and_contents(make_shards, make_sample) -> None:
    index = Index.open([make_shards(12, per_shard=5)])
    assert len(index) == 12
    assert [header.source.name for header in index.shards] == ["a-000000.tar", "a-000001.tar", "a-000002.tar"]
    assert index.column("height").tolist()[:5] == [8, 8, 16, 12, 4]
    assert index.column("width").tolist()[:5] == [8, 12, 8, 12, 20]
    assert set(index.column("frames").tolist()) == {1}
    assert index.column("label").tolist()[:4] == [0, 1, 2, 0]
    assert index.column("caption_length").tolist()[:2] == [12, 12]
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
    index = Index.open([folder])
    assert len(index) == 12
    if path.read_bytes() != good:  # a column, which is looked at when it is used
        with pytest.raises(
            DamagedIndexError,
            match="is damaged, or another since it was opened; build it anew with `lumina data index`",
        ):
            [index.column(name) for name in COLUMNS]
        assert index_shards([folder]) == 12
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


# The seven kinds of damage, of which webdataset 1.0.2 reports one, and a missing shard.


@pytest.fixture(params=["local", "http"])
def build(request: pytest.FixtureRequest, shard: Path, tmp_path: Path):
    """build(shard) indexes it as a file, or through a web server."""
    if request.param == "local":
        yield build_index
    else:
        with serving(shard.parent) as server:
            yield lambda shard: build_index(source_of(f"{server.url}/{shard.name}"), tmp_path / "indexes")


def test_damage_truncated_inside_a_member(shard: Path, build) -> None:
    _, content = member_at(shard, "s0007.png")
    os.truncate(shard, content + 20)
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*truncated inside s0007.png"):
        build(shard)
    assert not index_path(shard).exists()


def test_damage_truncated_between_members(shard: Path, build) -> None:
    header, _ = member_at(shard, "s0007.json")
    for size in (header + 100, header):
        os.truncate(shard, size)
        with pytest.raises(
            ValueError, match=r"a-000000.tar is damaged.*after s0006.txt.*truncated.*without the end mark"
        ):
            build(shard)


def test_damage_end_mark_cut(shard: Path, build) -> None:
    _, content = member_at(shard, "s0011.txt")
    for size in (content + 1024, content + 512):  # one of the two blocks of the mark, then none
        os.truncate(shard, size)
        with pytest.raises(
            ValueError, match=r"after s0011.txt: the shard is truncated: it ends (inside|without) the end"
        ):
            build(shard)


@pytest.mark.parametrize("length", [512, 2048, 6000])
def test_damage_hole_of_zeros(shard: Path, build, length: int) -> None:
    header, _ = member_at(shard, "s0004.json")
    overwrite(shard, header, bytes(length))
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*after s0003.txt.*hole of zeros"):
        build(shard)


def test_damage_tail_of_zeros(shard: Path, build) -> None:
    header, _ = member_at(shard, "s0000.txt")
    size = shard.stat().st_size
    overwrite(shard, header, bytes(size - header))
    with pytest.raises(ValueError, match=r"after s0000.png: only zeros follow.*was lost"):
        build(shard)


@pytest.mark.parametrize("byte", [3, 120, 130, 150, 260])
def test_damage_bit_in_a_header(shard: Path, build, byte: int) -> None:
    header, _ = member_at(shard, "s0005.png")
    flip(shard, header + byte)
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged.*after s0005.json.*header is damaged"):
        build(shard)


def test_damage_bit_in_a_payload(shard: Path) -> None:
    _, content = member_at(shard, "s0005.txt")
    index = Index.open([shard])
    flip(shard, content + 2)
    index.read(4)
    with pytest.raises(BadSampleError, match=r"\.txt at byte \d+ does not match its CRC"):
        index.read(5)
    with serving(shard.parent) as server:
        remote = Index.open([f"{server.url}/{shard.name}"], build_missing=False)
        assert remote.hash == index.hash
        assert remote.read(4) == index.read(4)
        with pytest.raises(BadSampleError, match=r"\.txt at byte \d+ does not match its CRC"):
            remote.read(5)
    os.utime(shard)
    assert Index.open([shard]).hash != index.hash


def test_damage_hole_in_a_caption(shard: Path) -> None:
    _, content = member_at(shard, "s0005.txt")
    overwrite(shard, content, bytes(5))
    with pytest.raises(BadSampleError, match="caption holds zero bytes"):
        decode_view(Index.open([shard]).read(5), View(4, 4), 1)


def test_damage_cut_between_picture_and_caption(shard: Path, build) -> None:
    header, _ = member_at(shard, "s0008.txt")
    close_tar(shard, header)
    with pytest.raises(ValueError, match=r"sample s0008 of shard .*a-000000.tar has a picture and no caption"):
        build(shard)


def test_damage_cut_before_the_picture(shard: Path, build) -> None:
    header, _ = member_at(shard, "s0008.png")
    close_tar(shard, header)
    with pytest.raises(ValueError, match=r"sample s0008 of shard .*a-000000.tar has none of jpg, .* among \['json'\]"):
        build(shard)


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
    assert (index.column("label").tolist(), index.column("caption_length").tolist()) == ([4], [-1])
    members = [("a.png", b"no picture"), ("a.txt", b"\xff"), ("b.png", picture), ("b.json", b"{")]
    index = Index.open([tar_of(tmp_path / "u.tar", members)])
    assert index.column("height").tolist() == [0, 8]
    assert index.column("caption_length").tolist() == [0, 0]


def test_sizes_are_those_after_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    members = []
    for extension, form in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        stream = io.BytesIO()
        Image.new("RGB", (20, 10)).save(stream, form, exif=exif)
        members += [(f"{extension}.{extension}", stream.getvalue()), (f"{extension}.txt", b"x")]
    index = Index.open([tar_of(tmp_path / "t.tar", members)])
    assert index.column("height").tolist() == [20] * 3
    assert index.column("width").tolist() == [10] * 3


def test_the_index_costs_no_python_object_a_sample(make_shards) -> None:
    index = Index.open([make_shards(50, per_shard=20)])
    columns = [index.column(name) for name in SAMPLE_COLUMNS]
    assert all(isinstance(column, np.ndarray) and column.dtype != object for column in columns)
    assert sum(column.nbytes for column in columns) == 50 * 29


def test_an_index_that_cannot_be_written_is_said(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"index of .*a-000000.tar cannot be written beside it \(No space left"):
        build_index(shard)
    assert [path.name for path in shard.parent.iterdir()] == ["a-000000.tar"]


# Headers, places of indexes, and several processes.


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_the_header_agrees_with_the_columns(make_shards) -> None:
    shard = make_shards(12, bad={3}) / "a-000000.tar"
    header = open_header(shard)
    assert (len(header), header.shard_size, header.identity) == (12, shard.stat().st_size, None)
    assert header.shard_sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert (header.uncaptioned, header.unlabeled, header.labels) == (0, 0, (0, 2))
    assert sorted(header.extensions) == ["json", "png", "txt"]
    expected = Counter((0, *size, 1) for size in [SIZES[n % 5] if n != 3 else (0, 0) for n in range(12)])
    assert {tuple(row[:4]): row[4] for row in header.shapes.tolist()} == expected
    assert header.shapes.tolist() == sorted(header.shapes.tolist())
    opened = header.open()
    assert {name: column.dtype for name, column in opened.columns.items()} == COLUMNS
    assert opened.columns["duration"].tolist() == [0.0] * 12


def test_kinds_and_features(tmp_path: Path) -> None:
    latent, features = npy(np.zeros((1, 1, 4, 6, 10), np.float16)), npy(np.zeros((7, 32), np.float16))
    video = npy(np.zeros((2, 5, 4, 6, 10), np.float32))
    members = [("a.latent.npy", latent), ("a.text.npy", features), ("b.latent.npy", video)]
    members += [("b.txt", b"words"), ("c.latent.npy", latent[:20]), ("c.text.npy", features)]
    members += [("d.latent.npy", npy(np.zeros(3))), ("d.jpg", b"what it was made of"), ("d.txt", b"x")]
    index = open_index(build_and_source(tar_of(tmp_path / "t.tar", members)))
    columns = {name: index.columns[name].tolist() for name in ("kind", "height", "width", "frames", "caption_length")}
    assert columns == {
        "kind": [KINDS.index("latent")] * 4,
        "height": [6, 6, 0, 0],
        "width": [10, 10, 0, 0],
        "frames": [1, 5, 1, 1],
        "caption_length": [0, 5, 0, 1],
    }
    assert index.header.labels is None
    assert set(KIND_OF_EXTENSION.values()) == set(KINDS)


def build_and_source(shard: Path) -> LocalSource:
    build_index(shard)
    return LocalSource(shard)


def test_headers_read_no_columns_and_columns_are_checked_when_used(make_shards) -> None:
    shard = make_shards(12) / "a-000000.tar"
    path = index_path(shard)
    data = path.read_bytes()
    place = data.index(b"s0000s0001") + 3  # in the keys
    flip(path, place)
    opened = open_header(shard).open()
    assert opened.columns["height"].tolist()[:2] == [8, 8]
    with pytest.raises(DamagedIndexError, match=r"index .*a-000000.index.safetensors is damaged, or another since"):
        opened.key(0)
    assert open_index(shard) is None
    assert index_shards([shard]) == 12
    assert path.read_bytes() == data


def test_any_flip_in_an_index_is_noticed(make_shards) -> None:
    shard = make_shards(4) / "a-000000.tar"
    path = index_path(shard)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(0, 12), *rng.integers(0, len(good), 300).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        index = open_index(shard)
        # What is left over are blanks that fill up the header.
        assert index is None or good[place : place + 1] == b" ", (place, good[place - 20 : place + 20])
    path.write_bytes(good[:-1])
    assert open_index(shard) is None


def test_an_index_of_version_1_is_rebuilt(make_shards) -> None:
    shard = make_shards(4) / "a-000000.tar"
    path = index_path(shard)
    facts = {"version": "1", "shard_size": shard.stat().st_size, "shard_sha256": "0" * 64, "extensions": ["png"]}
    path.write_bytes(save({"height": np.zeros(4, np.int32)}, {"index": json.dumps(facts)}))
    assert open_header(shard) is None
    assert len(Index.open([shard])) == 4
    assert open_header(shard).samples == 4


QUICK = Retry(attempts=4, seconds=20.0, first_pause=0.001, longest_pause=0.002)


def test_remote_shards_use_the_index_beside_them(make_shards, make_sample) -> None:
    folder = make_shards(12, per_shard=5)
    with serving(folder) as server:
        server.fault = lambda name, count: 503 if count == 2 else None
        shards = find_shards([f"{server.url}/a-{{000000..000002}}.tar"], retry=QUICK)
        headers = open_headers(shards)
        assert [header.samples for header in headers] == [5, 5, 2]
        assert server.bytes["a-000000.tar"] == 1, "of the shard only its size is asked for"
        opened = headers[1].open()
        extension, offset, size, _ = next(member for member in opened.members(2) if member[0] == "png")
        assert shards[1].read(offset, size) == make_sample(7)[extension]
        assert opened.key(2) == "s0007"
        (folder / "a-000001.tar").write_bytes((folder / "a-000001.tar").read_bytes() + bytes(512))
        (folder / "a-000002.index.safetensors").unlink()
        assert open_headers(find_shards([f"{server.url}/a-{{000001..000002}}.tar"])) == [None, None]
        with pytest.raises(ValueError, match=r"a-000002.tar has no index beside it.*--index-dir"):
            build_index(shards[2])
        (folder / "a-000000.tar").unlink()
        with pytest.raises(MissingSourceError, match=r"http://.*/a-000000.tar is missing"):
            open_header(source_of(f"{server.url}/a-000000.tar"))


def test_remote_shards_are_indexed_into_a_folder(make_shards, tmp_path: Path) -> None:
    folder, indexes = make_shards(12, per_shard=5), tmp_path / "deep/indexes"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with serving(folder) as server:
        server.fault = lambda name, count: "drop" if name.endswith(".tar") and count == 2 else None
        pattern = f"{server.url}/a-{{000000..000002}}.tar"
        for _ in range(2):
            assert index_shards([pattern], index_dir=indexes, retry=QUICK) == 12
        size = (folder / "a-000000.tar").stat().st_size
        assert server.bytes["a-000000.tar"] in range(size + 2, 2 * size), "each shard was read once, and one half again"
        source = find_shards([pattern])[0]
        header = open_header(source, indexes)
        assert header.identity == source.identity()
        assert index_path_in(indexes, source).is_file()
        assert open_header(source) is None
        server.etags["a-000000.tar"] = '"another"'
        assert open_header(find_shards([pattern])[0], indexes) is None
        assert index_shards([pattern], index_dir=indexes) == 12
        assert open_header(find_shards([pattern])[0], indexes).samples == 5
    assert len(list(indexes.iterdir())) == 3
    local = index_shards([folder])
    assert local == 12


def test_the_server_goes_while_indexing(make_shards, tmp_path: Path) -> None:
    folder = make_shards(3)
    (folder / "a-000000.index.safetensors").unlink()
    with serving(folder) as server:
        source = source_of(f"{server.url}/a-000000.tar", retry=QUICK)
        server.fault = lambda name, count: 500 if count > 1 and name.endswith(".tar") else None
        with pytest.raises(ValueError, match=r"a-000000.tar cannot be read \(4 attempts.*answers 500"):
            build_index(source, tmp_path / "indexes")
    assert not list((tmp_path / "indexes").glob("*"))


def test_pipes_are_indexed(make_shards, tmp_path: Path) -> None:
    folder = make_shards(5)
    index_path(folder / "a-000000.tar").unlink()
    pattern = f"pipe:cat {folder}/a-000000.tar"
    assert index_shards([pattern], index_dir=tmp_path / "i", pipe_programs=["cat"]) == 5
    header = open_header(PipeSource(f"cat {folder}/a-000000.tar", ["cat"]), tmp_path / "i")
    assert header.shard_sha256 == hashlib.sha256((folder / "a-000000.tar").read_bytes()).hexdigest()
    os.truncate(folder / "a-000000.tar", 5000)
    with pytest.raises(ValueError, match="is damaged at byte"):
        index_shards([pattern], index_dir=tmp_path / "j", pipe_programs=["cat"])


def test_a_folder_that_cannot_be_written(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if "w" in mode and self.parent == shard.parent:
            raise PermissionError(13, "Permission denied")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(ValueError, match=r"index of .*a-000000.tar cannot be written beside it \(Permission denied\)"):
        build_index(shard)
    path = build_index(shard, tmp_path / "indexes")
    assert path.parent == tmp_path / "indexes"
    assert open_header(shard) is None
    assert open_header(shard, tmp_path / "indexes").identity == LocalSource(shard).identity()
    os.utime(shard, ns=(1, 1))
    assert open_header(shard, tmp_path / "indexes") is None


def test_a_shard_that_changes_while_it_is_indexed(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = iter(["1-1", "1-2"])
    monkeypatch.setattr(LocalSource, "identity", lambda self: next(identities))
    with pytest.raises(ValueError, match=r"a-000000.tar changed while it was indexed"):
        build_index(shard)
    assert not index_path(shard).exists()


def test_workers_index_and_go_on(make_shards) -> None:
    folder = make_shards(30, per_shard=5)
    indexes = sorted(folder.glob("*.safetensors"))
    expected = [path.read_bytes() for path in indexes]
    kept = indexes[2].stat().st_mtime_ns
    for path in indexes[3:]:
        path.unlink()
    flip(indexes[0], len(expected[0]) - 5)
    seen = []
    assert index_shards([folder], lambda done, of: seen.append((done, of)), workers=2) == 30
    assert seen == [(number, 6) for number in range(1, 7)]
    assert [path.read_bytes() for path in indexes] == expected
    assert indexes[2].stat().st_mtime_ns == kept
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]
    for path in indexes:
        path.unlink()
    os.truncate(folder / "a-000001.tar", 2000)
    os.truncate(folder / "a-000004.tar", 2000)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a-000001.tar is damaged.*\(1 more of 6 shards cannot be indexed\)"):
            index_shards([folder], workers=workers)
        assert [path.exists() for path in indexes] == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match="at least 1 worker, not 0"):
        index_shards([folder], workers=0)


def test_a_set_that_is_all_bad_is_given_up(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(6, per_shard=1)
    monkeypatch.setattr("lumina.data.indexing._MOST_FAILURES", 3)
    for path in folder.iterdir():
        path.unlink() if path.suffix == ".safetensors" else os.truncate(path, 700)
    seen = []
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged"):
        index_shards([folder], lambda done, of: seen.append(done))
    assert seen == [1, 2]


def test_two_hosts_index_one_folder(make_shards, tmp_path: Path) -> None:
    folder = make_shards(40, per_shard=2)
    indexes = sorted(folder.glob("*.safetensors"))
    expected = [path.read_bytes() for path in indexes]
    for path in indexes:
        path.unlink()
    command = [sys.executable, "-m", "lumina", "data", "index", str(folder), "--workers", "1"]
    hosts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [host.communicate()[0] for host in hosts] == ["40 samples indexed\n"] * 2
    assert [path.read_bytes() for path in indexes] == expected
    assert len(list(folder.iterdir())) == 40


def test_the_command(make_shards, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_shards(12, per_shard=5)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    indexes = str(tmp_path / "i")
    with serving(folder) as server:
        url = f"{server.url}/a-{{000000..000001}}.tar"
        pipe = f"pipe:cat {folder}/a-000002.tar"
        options = ["--workers", "1", "--index-dir", indexes]
        assert main(["data", "index", url, pipe, *options, "--allow-pipe", "cat"]) == 0
        assert capsys.readouterr().out == "12 samples indexed\n"
        assert main(["data", "index", url, pipe, *options]) == 2
        assert "would run cat, which data.pipe_programs does not allow" in capsys.readouterr().err
        assert main(["data", "index", url, "--workers", "1"]) == 2
        assert "--index-dir" in capsys.readouterr().err
    assert len(os.listdir(indexes)) == 3


@given(
    st.lists(st.lists(st.tuples(*[st.integers(0, 3)] * 4, st.integers(1, 9)), max_size=6), max_size=5), st.booleans()
)
def test_contents_of_all_shards_are_added_up(tables, often):
    """Each shape once, with the samples of all shards, in whatever portions the shards' tables are merged."""
    expected: Counter[tuple[int, ...]] = Counter()
    headers = []
    for table in tables:
        rows = {(kind, 2**31 - 4 + height, width, frames * 2**20): n for kind, height, width, frames, n in table}
        expected.update(rows)
        columns = np.repeat(np.array(list(rows), np.int32).reshape(-1, 4), list(rows.values()), axis=0).T
        histogram = _histogram(dict(zip(("kind", "height", "width", "frames"), columns, strict=True)))
        labels, nowhere = (len(headers), 7), LocalSource("nowhere")
        told = (columns.shape[1], 0, "", None, (), 1, 2, labels, histogram)
        headers.append(ShardHeader(nowhere, nowhere, *told, (0, {}, {})))
    with pytest.MonkeyPatch.context() as patch:
        if often:
            patch.setattr(index_module, "_MERGED_AT_ONCE", 3)
        contents = index_module._contents(headers)
    found = list(zip(zip(*(column.tolist() for column in contents.shapes), strict=True), contents.counts, strict=True))
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert (contents.uncaptioned, contents.unlabelled) == (len(tables), 2 * len(tables))
    assert contents.labels == ((0, 7) if tables else None)
