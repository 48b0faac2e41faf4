"""Making indexes: where they are put, from what, and by how many processes and hosts."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.data.find import find_shards
from lumina.data.indexing import build_index, index_shards
from lumina.data.processes import Report, run_jobs
from lumina.data.shard_index import (
    index_path,
    index_path_in,
    open_header,
    open_headers,
)
from lumina.data.sources import LocalSource, MissingSourceError, PipeSource, Retry, source_of
from tests.data.faulty_http import serving
from tests.data.tars import flip


def test_index_shards_reports_progress(make_shards) -> None:
    folder = make_shards(12, per_shard=5)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    seen = []
    assert index_shards([folder], lambda done, of: seen.append((done, of))) == 12
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert index_shards([folder]) == 12


def test_an_index_that_cannot_be_written_is_said(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"index of .*a-000000.tar cannot be written beside it \(No space left"):
        build_index(shard)
    assert [path.name for path in shard.parent.iterdir()] == ["a-000000.tar"]


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


# Remote shards


QUICK = Retry(attempts=4, seconds=600.0, first_pause=0.001, longest_pause=0.002)


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


# Several processes


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


def test_one_shard_under_two_names(make_shards) -> None:
    folder = make_shards(12, per_shard=5)
    (folder / "b.tar").write_bytes((folder / "a-000001.tar").read_bytes())
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"^shards .*/a-000001.tar and .*/b.tar hold the same bytes; name one of"):
            index_shards([folder], workers=workers)
    assert index_path(folder / "b.tar").is_file()
    (folder / "b.tar").unlink()
    (folder / "b.index.safetensors").unlink()
    assert index_shards([folder]) == 12


def test_a_set_that_is_all_bad_is_given_up(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(6, per_shard=1)
    monkeypatch.setattr("lumina.data.indexing._MOST_FAILURES", 3)
    for path in folder.iterdir():
        path.unlink() if path.suffix == ".safetensors" else os.truncate(path, 700)
    seen = []
    with pytest.raises(ValueError, match=r"a-000000.tar is damaged"):
        index_shards([folder], lambda done, of: seen.append(done))
    assert seen == [1, 2]


def said_by(command: list[str], _: Report) -> tuple[str, int]:
    """What the command prints, and the process that it ran in."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(command) == 0
    return said.getvalue(), os.getpid()


def test_two_hosts_index_one_folder(make_shards, tmp_path: Path) -> None:
    folder = make_shards(40, per_shard=2)
    indexes = sorted(folder.glob("*.safetensors"))
    expected = [path.read_bytes() for path in indexes]
    for path in indexes:
        path.unlink()
    command = ["data", "index", str(folder), "--workers", "1"]
    hosts = dict(run_jobs(said_by, [command, command], 2, lambda count: None))
    assert {said for said, _ in hosts.values()} == {"40 samples indexed\n"}
    assert len({process for _, process in hosts.values()}) == 2
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
