"""The index: what it holds of a shard, and when it is built anew."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from lumina.data import index as index_module
from lumina.data.index import Index
from lumina.data.indexing import KIND_OF_EXTENSION, build_index, index_shards
from lumina.data.shard_index import (
    COLUMNS,
    KINDS,
    SAMPLE_COLUMNS,
    UNREADABLE,
    DamagedIndexError,
    ShardHeader,
    ShardIndex,
    _histogram,
    index_path,
    open_header,
    open_index,
)
from lumina.data.sources import LocalSource
from lumina.data.write import write_shards
from tests.data.conftest import SIZES
from tests.data.tars import flip, tar_of


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


def test_a_json_that_does_not_read_is_one_bad_sample(make_sample, tmp_path: Path) -> None:
    """... and not a shard cut in two, as it has neither what the others have, nor says that it lacks it."""

    def opened(*contents: bytes) -> ShardIndex:
        members = [
            (f"{i}.{ext}", data) for i, json in enumerate(contents) for ext, data in (("png", b""), ("json", json))
        ]
        build_index(tar_of(tmp_path / "t.tar", members))
        return open_index(tmp_path / "t.tar")

    labelled = opened(b'{"label": 4}', b"{", b'{"label": "four"}', b'{"label": 2, "caption": 5}')
    assert labelled.columns["caption_length"].tolist() == [-1] * 4
    assert labelled.columns["label"].tolist() == [4, UNREADABLE, UNREADABLE, 2]
    assert (labelled.header.uncaptioned, labelled.header.unlabeled, labelled.header.labels) == (4, 0, (2, 4))
    captioned = opened(b"{", b'{"caption": "four"}', b'{"caption": 4}')
    assert captioned.columns["caption_length"].tolist() == [0, 4, 0]
    assert (captioned.header.uncaptioned, captioned.header.unlabeled, captioned.header.labels) == (0, 2, None)
    with pytest.raises(ValueError, match=r"sample 2 of .* has a picture and no caption while others have one"):
        opened(b"{", b'{"caption": "four"}', b'{"label": 4}')
    with pytest.raises(ValueError, match=r"sample 1 of .* has a picture and neither caption nor label"):
        opened(b"{", b"{}")


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


# Headers


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
