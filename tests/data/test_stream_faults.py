"""Damage and faults on the whole way from the shard to the batch: found, named, replaced; never half a sample."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.index import Access, DataSet, Index
from lumina.data.loader import Loader
from lumina.data.sources import Retry
from lumina.data.write import write_shards
from tests.data.conftest import SIZES, SIZING, plan_of, sample
from tests.data.faulty_http import FaultyServer, serving
from tests.data.streams import global_stream, samples_of, take

SHARD = "d-000001.tar"


def loader_of(index: Index, rank: int = 0, world: int = 1, plan: dict | None = None, **options: object) -> Loader:
    return Loader(index, plan_of(index, **(plan or {})), SIZING, rank=rank, world=world, **({"channels": 1} | options))


# Damaged shards


def member_at(shard: Path, name: str) -> tuple[int, int]:
    """Offsets of a member's header and of its content in bytes."""
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def flip(shard: Path, offset: int) -> None:
    overwrite(shard, offset, bytes([shard.read_bytes()[offset] ^ 4]))


def cut_and_closed(shard: Path, offset: int) -> None:
    data = shard.read_bytes()[:offset] + bytes(1024)
    shard.write_bytes(data + bytes(-len(data) % 10240))


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, str, str]]] = {
    # What happens where it is done before the shard was indexed; after that, by a disk that changes no time; after
    # that, by a program.
    "truncated in a member": (
        lambda shard: os.truncate(shard, member_at(shard, "s0019.png")[1] + 20),
        ("refused", "refused", "refused"),
    ),
    "truncated between members": (
        lambda shard: os.truncate(shard, member_at(shard, "s0019.png")[0]),
        ("refused", "refused", "refused"),
    ),
    "end mark cut": (
        lambda shard: os.truncate(shard, member_at(shard, "s0023.txt")[1] + 512),
        ("refused", "refused", "refused"),
    ),
    "hole of zeros": (
        lambda shard: overwrite(shard, member_at(shard, "s0016.json")[0], bytes(1536)),
        ("refused", "replaced", "refused"),
    ),
    "tail of zeros": (
        lambda shard: overwrite(shard, at := member_at(shard, "s0014.png")[0], bytes(shard.stat().st_size - at)),
        ("refused", "refused", "refused"),
    ),
    "bit in a header": (
        lambda shard: flip(shard, member_at(shard, "s0017.png")[0] + 130),
        ("refused", "served", "refused"),  # nothing of a header is read any more
    ),
    "bit in a picture": (
        lambda shard: flip(shard, member_at(shard, "s0017.png")[1] + 60),
        ("replaced", "replaced", "replaced"),
    ),
    "cut between picture and caption": (
        lambda shard: cut_and_closed(shard, member_at(shard, "s0020.txt")[0]),
        ("refused", "refused", "refused"),
    ),
    "missing": (lambda shard: shard.unlink(), ("refused", "refused", "refused")),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "when",
    [pytest.param("before indexing", marks=SLOW), "by the disk", pytest.param("by a program", marks=SLOW)],
)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_no_part_served(kind: str, when: str, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_shards(folder, [sample(number) for number in range(36)], name="d", samples_per_shard=12)
    shard, (damage, expected) = folder / SHARD, DAMAGES[kind]
    good = {
        s.key: (s.pixels.numpy().tobytes(), s.caption) for s in samples_of(take(loader_of(Index.open([folder])), 9))
    }
    assert len(good) == 36
    times = shard.stat()
    damage(shard)
    if when == "before indexing":
        shard.with_suffix(".index.safetensors").unlink()
    elif shard.exists() and when == "by the disk":
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif shard.exists():
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns + 10**12))
    served, said = [], None
    try:
        stream = iter(loader_of(Index.open([folder]), bad_samples=0.1, ledger_path=tmp_path / "ledger"))
        for _ in range(9):
            served += samples_of([next(stream)])
    except ValueError as error:
        said = str(error)
        assert SHARD in said
        assert "\n" not in said
    for one in served:
        assert (one.pixels.numpy().tobytes(), one.caption) == good[one.key], "half a sample was served"
    ledger = [json.loads(line) for line in _lines(tmp_path / "ledger")]
    assert all(line["shard"].endswith(SHARD) for line in ledger)
    outcome = "refused" if said else "replaced" if ledger else "served"
    assert outcome == expected[["before indexing", "by the disk", "by a program"].index(when)], said
    keys = {one.key for one in served}
    if outcome == "replaced":
        assert {line["key"] for line in ledger} == {"s0016"} if kind == "hole of zeros" else {"s0017"}
        assert keys == good.keys() - {line["key"] for line in ledger}
    if outcome == "served":
        assert keys == good.keys()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_damage_while_it_is_read(tmp_path: Path) -> None:
    """Of a shard that is open already: truncated or written over in place, or another put in its place."""
    for kind in ("truncated", "written over", "another in its place"):
        folder = tmp_path / kind
        write_shards(folder, [sample(number) for number in range(36)], name="d", samples_per_shard=36)
        shard, index = folder / "d-000000.tar", Index.open([folder])
        good = {index.key(i): index.read(i) for i in range(36)}
        loader = loader_of(index, bad_samples=0.5, ledger_path=tmp_path / f"{kind}.ledger")
        stream = iter(loader)
        next(stream)
        if kind == "truncated":
            os.truncate(shard, 2000)
            with pytest.raises(ValueError, match=r"d-000000\.tar ends at byte 2000, before byte \d+"):
                take(loader, 9)
        elif kind == "written over":
            for number in (3, 8):
                flip(shard, member_at(shard, f"s{number:04d}.txt")[1] + 2)
            served = {one.key: one.caption for one in samples_of([next(stream) for _ in range(9)])}
            assert all(good[key]["txt"].decode().strip() == caption for key, caption in served.items())
            ledger = map(json.loads, _lines(tmp_path / f"{kind}.ledger"))
            assert {(line["key"], "does not match its CRC" in line["reason"]) for line in ledger} == {
                ("s0003", True),
                ("s0008", True),
            }
        else:
            other, knows_all = tmp_path / "other", Index.open([folder])
            knows_all.reader.table(0).checked()
            write_shards(other, [sample(number + 1) for number in range(36)], name="d", samples_per_shard=36)
            for path in other.iterdir():
                path.replace(folder / path.name)
            captions = {one.key: one.caption for one in samples_of([next(stream) for _ in range(9)])}
            assert all(good[key]["txt"].decode().strip() == caption for key, caption in captions.items())
            with pytest.raises(ValueError, match=r"d-000000\.tar was removed or changed while it was in use"):
                take(loader_of(knows_all), 1)
            with pytest.raises(ValueError, match=r"d-000000\.index\.safetensors is damaged, or another since"):
                take(loader_of(Index([index.shards])), 1)


# Bad samples


def jpeg(number: int, bad: bool) -> bytes:
    height, width = SIZES[number % len(SIZES)]
    stream = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(levels).save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    broken = (data[: len(data) // 2], b"\xff\xd8" + bytes(200), b"", data.replace(b"\xff\xc0", b"\xff\xff"))
    return broken[number // 7 % 4] if bad else data


def jpegs(folder: Path, count: int, bad: set[int], per_shard: int = 100) -> Path:
    samples = (
        {"__key__": f"j{number:04d}", "jpg": jpeg(number, number in bad), "txt": f"number {number}"}
        for number in range(count)
    )
    write_shards(folder, samples, name="j", samples_per_shard=per_shard)
    return folder


BAD = {17, 150, 283}
JPEG_PLAN = {"tokens_per_pack": 100, "packs": 8}


def test_one_percent_of_jpegs(tmp_path: Path) -> None:
    """The same stand-ins under any world and on a rerun; every bad one in the ledger of the rank that met it."""
    index = Index.open([jpegs(tmp_path / "jpegs", 300, BAD)])
    streams = {}
    for world in (1, 1, 2, 4):
        for path in tmp_path.glob("ledger*"):
            path.unlink()
        bad = []

        def open_loader(rank: int, world: int, bad: list = bad, **options: object) -> Loader:
            bad.append(loader_of(index, rank, world, JPEG_PLAN, ledger_path=tmp_path / f"ledger{rank}", **options))
            return bad[-1]

        packs, state = global_stream(open_loader, world, None, 6)
        assert streams.setdefault("packs", packs) == packs, f"world {world}"
        assert state.epoch >= 1
        ledger = [json.loads(line) for path in tmp_path.glob("ledger*") for line in path.read_text().splitlines()]
        assert {line["key"] for line in ledger} == {f"j{number:04d}" for number in BAD}
        assert {line["sample_id"] for line in ledger} == BAD
        assert all(line["shard"].endswith(f"j-{line['sample_id'] // 100:06d}.tar") for line in ledger)
        assert all(line["reason"] for line in ledger)
        assert len(ledger) == sum(len(loader._bad) for loader in bad)
    served = [one[:3] for pack in streams["packs"] for one in pack]
    assert len(set(served)) == len(served), "two samples share their noise"
    assert not BAD & {sample_id for sample_id, _, _ in served}
    first = [sample_id for sample_id, epoch, occurrence in served if epoch == 0 and occurrence == 0]
    waiting = [sample_id for lane in state.lanes for sample_id, epoch in lane.waiting if epoch == 0]
    assert sorted(first + waiting) == [i for i in range(300) if i not in BAD]
    replaced = [(sample_id, occurrence - 1) for sample_id, epoch, occurrence in served if occurrence and epoch == 0]
    assert {bad for _, bad in replaced} == BAD
    tokens = plan_of(index, **JPEG_PLAN).tokens_of(np.arange(300), 1)
    assert all(tokens[by] <= tokens[bad] and by // 100 == bad // 100 for by, bad in replaced)


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=SLOW)])
def test_twenty_percent_of_jpegs_stop_the_run(tmp_path: Path, world: int) -> None:
    index = Index.open([jpegs(tmp_path / "jpegs", 300, set(range(2, 300, 5)))])
    loader = loader_of(index, world - 1, world, JPEG_PLAN, ledger_path=tmp_path / "ledger")
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ samples read are bad, more than data\.bad_samples=0\.01"
    ) as caught:
        take(loader, 100)
    last = json.loads(_lines(tmp_path / "ledger")[-1])
    assert f"sample {last['key']} of shard {last['shard']}: {last['reason']}" in str(caught.value)
    assert int(str(caught.value).split()[2]) <= 40, "found early"


def test_stand_ins_come_from_the_set(tmp_path: Path) -> None:
    """Even where each shard has but one sample, and the other set most of the shards."""
    bad, single, other = {0, 2, 3, 6}, tmp_path / "single", tmp_path / "other"
    jpegs(single, 8, bad, per_shard=1)
    write_shards(other, [sample(4) | {"__key__": f"o{n}"} for n in range(30)], name="o", samples_per_shard=1)
    index = Index.open([DataSet([other]), DataSet([single])])
    assert index.key(33) == "j0003"
    samples = samples_of(take(loader_of(index, bad_samples=1.0), 12))
    assert {one.occurrence - 1 for one in samples if one.occurrence} == {30, 32, 33, 36}
    assert {one.sample_id for one in samples if one.occurrence} <= {31, 34, 35, 37}


def test_stand_ins_come_from_another_set_where_their_own_has_none_as_short(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    jpegs(large, 1, {0})
    write_shards(small, [sample(n) for n in range(30)], name="s", samples_per_shard=10)
    samples = samples_of(take(loader_of(Index.open([DataSet([large]), DataSet([small])]), bad_samples=1.0), 4))
    replaced = [one for one in samples if one.occurrence]
    assert len(replaced) > 5
    assert all(one.occurrence == 1 and one.sample_id >= 1 for one in replaced)


def test_a_shard_that_is_bad_altogether(tmp_path: Path) -> None:
    index = Index.open([jpegs(tmp_path / "jpegs", 150, set(range(50, 100)), per_shard=50)])
    with pytest.raises(ValueError, match=r"samples read are bad, more than data\.bad_samples=0\.01.*j-000001\.tar"):
        take(loader_of(index, plan=JPEG_PLAN), 30)
    loader = loader_of(index, plan=JPEG_PLAN, bad_samples=0.5, ledger_path=tmp_path / "ledger")
    packs, state = global_stream(lambda rank, world, **o: loader, 1, None, 4)
    samples = [one for pack in packs for one in pack]
    assert not {one[0] for one in samples} & set(range(50, 100))
    replaced = {one[2] - 1 for one in samples if one[2]}
    waiting = {sample_id for lane in state.lanes for sample_id, _ in lane.waiting}
    assert state.epoch >= 1
    assert replaced | waiting >= set(range(50, 100))
    assert len(replaced) > 20
    assert len({one[:3] for one in samples}) == len(samples)
    assert {json.loads(line)["key"] for line in _lines(tmp_path / "ledger")} == {f"j{n:04d}" for n in range(50, 100)}


# Over the network


def over_http(server: FaultyServer, shards: int, cache: Path) -> Index:
    access = Access(cache_dir=str(cache / "blocks"), index_dir=str(cache / "indexes"))
    index = Index.open([f"{server.url}/d-{{000000..{shards - 1:06d}}}.tar"], access=access)
    for header in index.shards:
        header.source.retry = Retry(first_pause=0.01, longest_pause=0.02)
    return index


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW)])
def test_two_loaders_fetch_each_byte_once(tmp_path: Path, workers: int) -> None:
    """With a worker each they are two processes, at work at the same time."""
    folder = tmp_path / "served"
    write_shards(folder, [sample(number) for number in range(72)], name="d", samples_per_shard=12)
    expected = [samples_of(take(loader_of(Index.open([folder]), rank, 2), 12)) for rank in range(2)]
    for index in folder.glob("*.safetensors"):
        index.unlink()
    with serving(folder) as server:
        loaders = [loader_of(over_http(server, 6, tmp_path / "here"), rank, 2, workers=workers) for rank in range(2)]
        server.bytes.clear()
        server.requests.clear()
        server.ranges.clear()
        # Of the requests for a shard some are refused, some answers cut.
        faults = {1: 503, 2: "drop", 3: 500, 4: "short"}
        server.fault = lambda name, count: faults.get(count) if name.endswith(".tar") else None
        streams = [iter(loader) for loader in loaders]
        found = [[], []]
        for _ in range(12):
            for rank in range(2):
                found[rank] += samples_of([next(streams[rank])])
        for stream in streams:
            stream.close()
        assert all(loader.state.epoch >= 1 for loader in loaders)
        for rank in range(2):
            assert len(found[rank]) == len(expected[rank])
            for here, there in zip(found[rank], expected[rank], strict=True):
                assert (here.sample_id, here.key, here.caption) == (there.sample_id, there.key, there.caption)
                assert here.pixels.equal(there.pixels)
        for shard in folder.glob("*.tar"):
            # One block and one good answer, the fifth; before it came half of it twice, and two pages that say no.
            size = shard.stat().st_size
            assert server.requests[shard.name] == 5
            assert size <= server.bytes[shard.name] <= 2 * size + 100
