"""The stream of samples: one and the same under any world, workers and breaks; each id once an epoch of its set."""

import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data import index as index_module
from lumina.data.index import DataSet, Index
from lumina.data.loader import Loader
from lumina.data.plan import DataState
from lumina.data.sources import LocalSource
from lumina.data.write import write_shards
from tests.data.conftest import SIZING, plan_of, sample
from tests.data.streams import each_once, global_stream, memory_shard, pixels_at, samples_of, take

SETS = ((23, 1, 12), (9, 8), (30,))
"""Samples of each shard of the sets that are blended."""


def loaders(index: Index, **plan: object) -> Callable[..., Loader]:
    def open_loader(rank: int, world: int, **options: object) -> Loader:
        made = plan_of(index, **plan)
        return Loader(index, made, SIZING, rank=rank, world=world, **({"channels": 1} | options))

    return open_loader


def written(folder: Path, sets: tuple[tuple[int, ...], ...] = SETS) -> list[DataSet]:
    """Sets on disk, all samples as often; every picture differs."""
    number, made = 0, []
    for which, shards in enumerate(sets):
        for place, count in enumerate(shards):
            samples = [sample(number + i) for i in range(count)]
            number += count
            write_shards(folder / f"{which}-{place}", samples, name=f"s{place}", samples_per_shard=1000)
        made.append(DataSet([folder / f"{which}-{place}" for place in range(len(shards))], float(sum(shards))))
    return made


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> list[DataSet]:
    return written(tmp_path_factory.mktemp("sets"))


def layouts_agree(
    open_loader: Callable[..., Loader], index: Index, layouts: list[tuple[int, int]], breaks: int
) -> None:
    """Each layout gives the same whole, also where it takes over from another in the middle of an epoch."""
    whole, end = global_stream(open_loader, 1, None, 2 * breaks)
    assert min(each_once(whole, end, index)) >= 1, "the test must go over the end of an epoch of each set"
    orders = open_loader(0, 1)._plan._orders
    for number, pack in enumerate(whole):
        for sample_id, epoch, *_ in pack:
            order = orders[next(i for i, starts in enumerate(index.starts) if sample_id < starts[-1])]
            firsts, lengths = order.pieces(epoch, number % len(end.lanes))
            assert ((firsts <= sample_id) & (sample_id < firsts + lengths)).any(), "a pack out of another lane"
    before, middle = global_stream(open_loader, 2, None, breaks)
    assert before == whole[: len(before)]
    assert any(taken for lane in middle.lanes for _, taken in lane.at), "the change must come within an epoch"
    for world, workers in layouts:
        after, last = global_stream(open_loader, world, middle, breaks, workers=workers)
        assert before + after == whole, f"world {world}, {workers} workers"
        assert last == end


def breaks_of(lanes: int, sets: int) -> int:
    """Batches, of 8 packs of 3 samples at least, that reach into the second epoch when they come twice."""
    return (sum(map(sum, SETS[:sets])) * 5 // 4 + 32 * lanes) // 48 + 2


@pytest.mark.parametrize(("lanes", "sets"), [(1, 1), (3, 2), pytest.param(8, 3, marks=pytest.mark.slow)])
def test_one_stream_under_any_world(on_disk, lanes: int, sets: int) -> None:
    index = Index.open(on_disk[:sets])
    open_loader = loaders(index, lanes=lanes, packs=8, tokens_per_pack=40, window=7, seed=lanes)
    layouts_agree(open_loader, index, [(1, 0), (2, 0), (4, 0)], breaks_of(lanes, sets))


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "sets"), [(1, 3), (3, 1), (4, 3), (8, 1)])
def test_one_stream_under_any_world_and_workers(on_disk, lanes: int, sets: int) -> None:
    index = Index.open(on_disk[:sets])
    open_loader = loaders(index, lanes=lanes, packs=8, tokens_per_pack=40, window=7, seed=lanes)
    layouts = [(world, workers) for world in (1, 2, 4) for workers in (1, 2)]
    layouts_agree(open_loader, index, layouts, breaks_of(lanes, sets))


ANY = {
    "sets": st.lists(st.lists(st.sampled_from([1, 1, 2, 5, 9, 17]), min_size=1, max_size=5), min_size=1, max_size=3),
    "weights": st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    "lanes": st.integers(1, 9),
    "packs": st.sampled_from([4, 8]),
    "tokens": st.integers(12, 40),
    "window": st.sampled_from([1, 3, 8, 30]),
    "worlds": st.permutations([1, 2, 4]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=5)
@given(**ANY)
def test_any_data_and_plan(**drawn) -> None:
    one_stream(**drawn)


@pytest.mark.slow
@settings(max_examples=25)
@given(**ANY)
def test_any_data_and_plan_at_length(**drawn) -> None:
    one_stream(**drawn)


def one_stream(sets, weights, lanes, packs, tokens, window, worlds, seed) -> None:
    """Shards, sets, weights, lanes, packs and window at random: two changes of world give what one world does."""
    number, headers = 0, []
    for shards in sets:
        headers.append([memory_shard(f"{n:03d}.tar", number + n, count) for n, count in enumerate(shards)])
        number += len(shards)
    index = Index(headers, weights[: len(sets)])
    open_loader = loaders(index, lanes=lanes, packs=packs, tokens_per_pack=tokens, window=window, seed=seed)
    whole, end = global_stream(open_loader, 1, None, 6)
    parts, state = [], None
    for world in worlds:
        part, state = global_stream(open_loader, world, state, 2)
        parts += part
    assert parts == whole
    assert state == end
    each_once(whole, end, index)
    for pack in whole:
        for sample_id, _, _, key, caption, _, (shape, pixels), *_ in pack:
            number, row = map(int, key.split("-"))
            levels = pixels_at(number, row)
            assert index.key(sample_id) == key
            assert (caption, shape) == (f"caption {key}", (1, 1, *levels.shape[:2]))
            assert np.abs(np.frombuffer(pixels, np.float32) - (levels.ravel() / 127.5 - 1)).max() < 1e-6


def test_a_plan_gives_for_a_state_what_it_gives(on_disk, monkeypatch) -> None:
    """Whatever it was asked before, and also where that failed half-way."""
    index = Index.open(on_disk)
    plan = plan_of(index, lanes=3)
    start = plan.start(index.hash)
    first, after = plan.batch(start)
    second, _ = plan.batch(after)
    assert plan.batch(start) == (first, after)
    fresh = plan_of(index, lanes=3)
    assert fresh.batch(after)[0] == second
    shapes, left = index.shapes, [20]

    def failing(ids: np.ndarray) -> object:
        left[0] -= 1
        if not left[0]:
            raise ValueError("out of reach")
        return shapes(ids)

    monkeypatch.setattr(index, "shapes", failing)
    stands = [start]

    def plan_on() -> None:
        while True:
            stands.append(plan.batch(stands[-1])[1])

    with pytest.raises(ValueError, match="out of reach"):
        plan_on()
    assert plan.batch(stands[-1]) == fresh.batch(stands[-1])


# A data set that changed


def test_shards_moved_or_named_otherwise_go_on(on_disk, tmp_path: Path) -> None:
    folder = Path(on_disk[0].shards[0]).parent
    index = Index.open(on_disk)
    whole, _ = global_stream(loaders(index), 1, None, 6)
    before, state = global_stream(loaders(index), 2, None, 3)
    shutil.copytree(folder, tmp_path / "moved")
    moved = [DataSet([tmp_path / "moved" / p.name for p in one.shards[::-1]], one.weight) for one in on_disk]
    after, _ = global_stream(loaders(Index.open(moved)), 4, state, 3)
    assert before + after == whole


CHANGES = ("a shard more", "a shard fewer", "another content", "another name", "other order of sets", "one set of two")


@pytest.mark.parametrize("change", CHANGES)
def test_another_data_set_is_refused(change: str, tmp_path: Path) -> None:
    sets = written(tmp_path, ((4, 5), (3,)))
    old = Index.open(sets)
    _, state = global_stream(loaders(old), 1, None, 1)
    if change == "a shard more":
        write_shards(tmp_path / "more", [sample(99)], name="s7", samples_per_shard=9)
        sets[0] = DataSet([*sets[0].shards, tmp_path / "more"], 1.0)
    elif change == "a shard fewer":
        sets[0] = DataSet(sets[0].shards[:1], 1.0)
    elif change == "another content":
        # One caption's letter, at the same place, in a tar that was not indexed again by hand.
        shard = tmp_path / "0-1" / "s1-000000.tar"
        shard.write_bytes(shard.read_bytes().replace(b"caption of 6", b"caption of 5"))
        os.utime(shard)
    elif change == "another name":
        for path in (tmp_path / "0-1").iterdir():
            path.rename(path.with_name(path.name.replace("s1", "t1")))
    elif change == "other order of sets":
        sets = sets[::-1]
    else:
        sets = [DataSet([*sets[0].shards, *sets[1].shards], 1.0)]
    new = Index.open(sets)
    sentence = (
        f"the data set has changed: the run stands in data {old.hash[:12]}, data.shards now names {new.hash[:12]}"
    )
    with pytest.raises(ValueError, match=sentence):
        loaders(new)(0, 1, state=state)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"lanes": 8}, r"the data state has 4 lanes, data\.lanes=8; set data\.lanes=4 to go on with that run"),
        (
            {"window": 63},
            r"data\.shuffle_window=63, but the data state is of a run with 64,.*set data\.shuffle_window=64",
        ),
    ],
)
def test_another_plan_is_refused(on_disk, plan: dict, sentence: str) -> None:
    index = Index.open(on_disk)
    _, state = global_stream(loaders(index), 1, None, 1)
    with pytest.raises(ValueError, match=sentence):
        take(loaders(index, **plan)(0, 1, state=state), 1)


def test_a_state_of_another_number_of_sets_is_refused(on_disk) -> None:
    index = Index.open(on_disk)
    state = DataState.start(index.hash, 64, 4, sets=2)
    with pytest.raises(ValueError, match="the data state is of 2 data sets, there are 3"):
        take(loaders(index)(0, 1, state=state), 1)


# What is opened


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """64 shards of 8 samples."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    write_shards(folder, [sample(number) for number in range(512)], name="m", samples_per_shard=8)
    return folder


def tars_opened(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> Counter[str]:
    """How often each tar was opened and read while `run` ran."""
    opened: Counter[str] = Counter()
    pread = LocalSource._pread

    def counted(source: LocalSource, offset: int, size: int) -> bytes:
        if source._descriptor is None and source.name.endswith(".tar"):
            opened[source.name] += 1
        return pread(source, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(LocalSource, "_pread", counted)
        run()
    return opened


def test_a_node_opens_its_lanes_shards_alone(many_shards: Path, monkeypatch) -> None:
    """64 shards, 16 lanes, 16 ranks, over a whole epoch: each shard is read by one rank, a node of 8 opens its own."""
    of_epoch: Counter[str] = Counter()
    opened_by: dict[int, set[str]] = {}
    for rank in range(16):
        loader = loaders(Index.open([many_shards]), lanes=16, packs=16, tokens_per_pack=64, window=8)(rank, 16)
        served: set[tuple[int, int]] = set()

        def run(loader: Loader = loader, served: set[tuple[int, int]] = served) -> None:
            stream = iter(loader)
            while sum(epoch == 0 for _, epoch in served) < 32:
                served.update((one.sample_id, one.epoch) for one in samples_of([next(stream)]))

        opened = tars_opened(monkeypatch, run)
        assert set(opened.values()) == {1}, "a shard was opened twice"
        assert set(opened) == {_tar(sample_id) for sample_id, _ in served}, "what is not served was opened"
        opened_by[rank] = set(opened)
        mine = {_tar(sample_id) for sample_id, epoch in served if epoch == 0}
        assert len(mine) == 4
        of_epoch.update(mine)
        # And of the next epoch at most the beginning.
        later = {_tar(first) for first in loader._plan._orders[0].pieces(1, rank)[0]}
        assert opened_by[rank] <= mine | later
    assert len(of_epoch) == 64
    assert set(of_epoch.values()) == {1}, "a shard was read by two ranks in one epoch"
    for node in (range(8), range(8, 16)):
        assert 32 <= len(set().union(*(opened_by[rank] for rank in node))) < 64


def _tar(sample_id: int) -> str:
    return f"m-{sample_id // 8:06d}.tar"


def test_a_long_run_holds_no_more(many_shards: Path, monkeypatch) -> None:
    """Open files and tables stay within their bounds, however many shards come by."""
    monkeypatch.setattr(index_module, "_TABLE_SAMPLES", 85)
    monkeypatch.setattr(index_module, "_OPEN_SOURCES", 6)
    gc.collect()  # loaders of other tests may still hold files
    index = Index.open([many_shards])
    loader = loaders(index, lanes=16, packs=16, tokens_per_pack=48, window=8)(0, 1)
    index.column("width")
    most = 0
    stream = iter(loader)
    while loader.state.epoch < 2:
        next(stream)
        most = max(most, sum(_in(many_shards, name) for name in os.listdir("/proc/self/fd")))
        reader = index.reader
        assert len(reader._tables) <= 10
        assert len(reader._sources) <= 6
        assert len(loader._plan._orders[0]._deals) <= 5
        assert max(len(lane.waiting) for lane in loader.state.lanes) <= 32
    assert most == 6
    assert len(json.dumps(loader.state.to_dict())) < 16 * 32 * 16 + 2000


def _in(folder: Path, descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    except FileNotFoundError:  # that with which they are listed
        return False
