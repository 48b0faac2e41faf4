"""Shards are written whole or not at all, equal bytes for equal samples, and webdataset reads them."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lumina.data.write import cut_into_shards, sample_bytes, shard_bytes, write_shard, write_shards


def test_equal_samples_give_equal_bytes(make_shards) -> None:
    def contents(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    one = make_shards(7, per_shard=3)
    first = contents(one)
    one.rename(one.with_name("before"))
    assert contents(make_shards(7, per_shard=3)) == first
    assert len(first) == 6


def test_webdataset_reads_them(make_shards, make_sample) -> None:
    folder = make_shards(7, per_shard=3)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"s{number:04d}" for number in range(7)]
    assert read[5]["png"] == make_sample(5)["png"]


def test_a_failure_leaves_nothing(make_sample, tmp_path: Path) -> None:
    def failing():
        yield make_sample(0)
        yield make_sample(1)
        raise RuntimeError("source failed")

    for target in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(RuntimeError, match="source failed"):
            write_shards(target, failing(), name="a", samples_per_shard=1)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not any((tmp_path / "empty").iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(make_sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written to .*new \(No space left on device\)"):
        write_shards(tmp_path / "new", [make_sample(0)], name="a", samples_per_shard=1)
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_is_taken_a_full_one_refused(make_sample, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_shards(tmp_path / "out", [make_sample(0)], name="a", samples_per_shard=1)[0].is_file()
    with pytest.raises(ValueError, match="out is not empty; shards are written into a new or empty folder"):
        write_shards(tmp_path / "out", [make_sample(0)], name="a", samples_per_shard=1)
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            write_shards(target, [make_sample(0)], name="a", samples_per_shard=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"__key__": "a.b"}, "without a dot"),
        ({"__key__": "/a"}, "without a dot"),
        ({"__key__": 3}, "without a dot"),
        ({"PNG": b""}, "lower case"),
        ({"_x": b""}, "extension '_x'"),
        ({"txt": 3}, ".txt of sample s0000 must be bytes, text or a dict, not int"),
        ({"jpg": b""}, "sample s0000 of shard .* has 2 of jpg, .* it must have one$"),
    ],
)
def test_bad_samples_are_refused(make_sample, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "out", [make_sample(0) | change], name="a", samples_per_shard=1)
    assert not any(tmp_path.iterdir())


def test_other_bad_arguments(make_sample, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples to write"):
        write_shards(tmp_path / "out", [], name="a", samples_per_shard=1)
    with pytest.raises(ValueError, match="samples_per_shard must be at least 1"):
        write_shards(tmp_path / "out", [make_sample(0)], name="a", samples_per_shard=0)
    with pytest.raises(ValueError, match="cannot start a file name"):
        write_shards(tmp_path / "out", [make_sample(0)], name="a/b", samples_per_shard=1)
    with pytest.raises(ValueError, match=r"sample s0000 of shard .* has .json twice"):
        write_shards(tmp_path / "out", [make_sample(0), make_sample(0)], name="a", samples_per_shard=5)


@pytest.mark.parametrize("part", ["k", "k" * 60, "k" * 120, "ü"])
@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 30000])
def test_sizes_are_known_before_writing(make_sample, tmp_path: Path, part: str, length: int) -> None:
    samples = [make_sample(n) | {"__key__": f"{part}/{n}{part}", "txt": "x" * length} for n in range(7)]
    shard = write_shard(tmp_path / "a.tar", samples)
    sizes = ({"png": len(sample["png"]), "txt": length, "json": len('{"label": 0}')} for sample in samples)
    size = sum(sample_bytes(sample["__key__"], of) for sample, of in zip(samples, sizes, strict=True))
    assert shard.stat().st_size == shard_bytes(size)
    with tarfile.open(shard) as tar:
        tar.getmembers()
        assert tar.offset == size  # where the end mark begins


def test_cut_into_shards() -> None:
    """Against filling them one by one."""
    generator = np.random.default_rng(0)
    for limit, most in ((20480, None), (50_000, 7), (10240, 3), (1 << 30, None), (1 << 30, 10)):
        sizes = generator.integers(2, 40, 200) * 512
        starts, used = [0], 0
        for number, size in enumerate(sizes.tolist()):
            if number > starts[-1] and (shard_bytes(used + size) > limit or number - starts[-1] == most):
                starts.append(number)
                used = 0
            used += size
        assert cut_into_shards(sizes, limit, most).tolist() == [*starts, 200]
    assert cut_into_shards(np.zeros(0, np.int64), 10240, None).tolist() == [0]
