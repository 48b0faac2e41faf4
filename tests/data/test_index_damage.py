"""Damage is found and named: the seven kinds, of which webdataset 1.0.2 reports one, and missing shards."""

import os
from pathlib import Path

import pytest

from lumina.data.decode import BadSampleError, View, decode_view
from lumina.data.find import find_shards
from lumina.data.index import Index
from lumina.data.indexing import build_index, index_shards
from lumina.data.shard_index import (
    index_path,
)
from lumina.data.sources import source_of
from tests.data.faulty_http import serving
from tests.data.tars import close_tar, flip, member_at, overwrite, tar_of


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
