"""The loader: one stream under any layout, exact resume, bad samples replaced, counted and bounded."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lumina.data.decode import decode_view
from lumina.data.index import Index
from lumina.data.loader import Batch, Loader, bad_budget
from lumina.data.plan import DataState
from lumina.data.sizing import Sizing, Stage
from lumina.data.workers import PackDecoder
from lumina.data.write import write_shards
from tests.data import conftest

COUNT = 97


@pytest.fixture
def make_loader(make_plan):
    def make(folder: Path, rank: int = 0, world: int = 1, plan: dict | None = None, **options) -> Loader:
        index = Index.open([folder])
        options = {"channels": 1} | options
        sizing = options.pop("sizing", conftest.SIZING)
        return Loader(index, make_plan(index, sizing=sizing, **(plan or {})), sizing, rank=rank, world=world, **options)

    return make


def take(loader: Loader, batches: int) -> list[Batch]:
    stream = iter(loader)
    taken = [next(stream) for _ in range(batches)]
    stream.close()
    return taken


def flat(batches: list[Batch]) -> list[tuple]:
    """Everything about each sample, pixels included."""
    return [
        (s.sample_id, s.epoch, s.occurrence, s.key, s.caption, s.label, s.pixels.numpy().tobytes())
        for batch in batches
        for pack in batch.packs
        for s in pack
    ]


def global_stream(make_loader, folder: Path, world: int, workers: int, state: DataState | None, batches: int):
    """The packs of all ranks put together again, and the state after them."""
    ranks = [take(make_loader(folder, rank, world, workers=workers, state=state), batches) for rank in range(world)]
    samples = []
    for step in zip(*ranks, strict=True):
        assert len({batch.state_after for batch in step}) == 1
        assert len({batch.global_samples for batch in step}) == 1
        before = len(samples)
        for place in range(len(step[0].packs)):
            for batch in step:
                samples += flat([Batch([batch.packs[place]], 0, batch.state_after, 0)])
        assert len(samples) - before == step[0].global_samples
    return samples, ranks[0][-1].state_after


def layouts_agree(make_loader, folder: Path, layouts: list[tuple[int, int]]) -> None:
    whole, end = global_stream(make_loader, folder, 1, 0, None, 6)
    assert end.epoch >= 1, "the test must cross the end of an epoch"
    places = [sample[:2] for sample in whole]
    waiting = {place for lane in end.lanes for place in lane.waiting}
    assert len(set(places)) == len(places)
    assert {(i, 0) for i in range(COUNT)} <= set(places) | waiting, "each id exactly once"
    half, middle = global_stream(make_loader, folder, 2, 0, None, 3)
    assert half == whole[: len(half)]
    assert any(taken for lane in middle.lanes for _, taken in lane.at), "the change must come within an epoch"
    stored = DataState.from_dict(json.loads(json.dumps(middle.to_dict())))
    for world, workers in layouts:
        rest, after = global_stream(make_loader, folder, world, workers, stored, 3)
        assert half + rest == whole, f"world {world}, workers {workers}"
        assert after == end


def test_one_stream_under_any_world(make_loader, make_shards) -> None:
    layouts_agree(make_loader, make_shards(COUNT, per_shard=40), [(1, 0), (2, 0), (4, 0)])


@pytest.mark.slow
def test_one_stream_with_a_bad_sample_under_any_world_and_workers(make_loader, make_shards) -> None:
    folder = make_shards(COUNT, per_shard=40, bad={13})
    whole, _ = global_stream(make_loader, folder, 1, 0, None, 6)
    half, middle = global_stream(make_loader, folder, 4, 2, None, 3)
    assert half == whole[: len(half)]
    for world, workers in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
        assert half + global_stream(make_loader, folder, world, workers, middle, 3)[0] == whole


def test_workers_give_the_same_and_leave_nothing(make_loader, make_shards) -> None:
    folder = make_shards(COUNT)
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    expected = flat(take(make_loader(folder), 3))
    before = {process.pid for process in multiprocessing.active_children()}
    loader = make_loader(folder, workers=2)
    stream = iter(loader)
    found = [next(stream) for _ in range(3)]
    assert flat(found) == expected
    assert torch.equal(torch.get_rng_state(), random_state), "the trainer's random state was touched"
    pids = {process.pid for process in multiprocessing.active_children()} - before
    assert len(pids) == 2
    stream.close()
    assert_gone(pids)
    assert flat(take(loader, 2)) == flat(take(make_loader(folder), 5)[3:]), "iterating again goes on where it stopped"


def test_errors_in_a_worker_arrive_as_one_sentence(make_loader, make_shards) -> None:
    folder = make_shards(COUNT)
    stream = iter(make_loader(folder, workers=1))
    next(stream)
    (folder / "a-000000.tar").rename(folder / "gone")
    loader = make_loader(make_shards(COUNT, name="b"), workers=1)
    (folder.parent / "b" / "b-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"b-000000.tar was removed or changed") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    stream.close()


@pytest.mark.slow
def test_a_killed_worker_is_reported(make_loader, make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch looks every 5 s whether its workers live.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    before = {process.pid for process in multiprocessing.active_children()}
    stream = iter(make_loader(make_shards(COUNT), workers=1))
    next(stream)
    (worker,) = {process.pid for process in multiprocessing.active_children()} - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a data worker died") as caught:
        deque(itertools.islice(stream, 1000), maxlen=0)
    assert "\n" not in str(caught.value)


KILLED_TRAINER = """
import multiprocessing, os, signal, sys
import torch
from lumina.data.index import Index
from lumina.data.loader import Loader
from lumina.data.plan import Plan
from lumina.data.sizing import Sizing, Stage
from lumina.data.workers import decoded_in_order

def threads(pack):
    return torch.get_num_threads()

if __name__ == "__main__":
    print(torch.get_num_threads(), *decoded_in_order(threads, [[], []], 2))
    index = Index.open([sys.argv[1]])
    sizes = {"tokens_per_pack": 8, "global_batch_packs": 4, "lanes": 4, "window": 8, "seed": 0}
    plan = Plan(index.starts, [1.0], lambda ids, step: ids * 0 + 1, **sizes)
    batches = iter(Loader(index, plan, Sizing(4, (Stage(0, None),)), rank=0, world=1, channels=1, workers=2))
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed_trainer(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Of a trainer of 2 threads that was killed: its threads and those of two workers; its workers."""
    folder = tmp_path_factory.mktemp("killed")
    write_shards(folder / "a", map(conftest.sample, range(20)), name="a", samples_per_shard=1000)
    (folder / "trainer.py").write_text(KILLED_TRAINER)
    # Into a file: a pipe would be held open by the very workers that must not stay.
    with (folder / "said").open("w") as stream:
        command = [sys.executable, folder / "trainer.py", folder / "a"]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(command, stdout=stream, env=environment, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL
    return [[int(word) for word in line.split()] for line in (folder / "said").read_text().splitlines()]


def test_packs_that_end_and_one_thread_a_worker(killed_trainer) -> None:
    """As many threads as cores in each of as many workers would only get into each other's way."""
    assert killed_trainer[0] == [2, 1, 1]


def test_a_killed_trainer_leaves_no_workers(killed_trainer) -> None:
    assert len(killed_trainer[1]) == 2
    assert_gone(killed_trainer[1])


def assert_gone(pids: Collection[int]) -> None:
    """Once they have had the time to end that a busy machine takes."""
    deadline = time.monotonic() + 600
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"workers stay: {left}"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("packs", "world", "nearest"), [(8, 3, 9), (7, 3, 6), (4, 8, 8), (5, 4, 4), (6, 4, 4), (3, 2, 2)]
)
def test_a_world_that_does_not_divide_is_refused(make_loader, make_shards, packs, world, nearest) -> None:
    folder = make_shards(5)
    message = f"global_batch_packs={packs} cannot be shared .* size of {world}; the nearest that can is {nearest}$"
    with pytest.raises(ValueError, match=message):
        make_loader(folder, 0, world, plan={"packs": packs})


def test_bad_arguments_are_refused(make_loader, make_plan, make_shards) -> None:
    folder, other = make_shards(5), make_shards(6, name="b")
    index = Index.open([folder])
    state = DataState.start(Index.open([other]).hash, 64, 4)
    with pytest.raises(ValueError, match=f"data set has changed: .* {state.index_hash[:12]}.* {index.hash[:12]}"):
        make_loader(folder, state=state)
    with pytest.raises(ValueError, match="rank 2 does not lie in a world of 2"):
        make_loader(folder, 2, 2)
    with pytest.raises(ValueError, match=r"data.workers=-1"):
        make_loader(folder, workers=-1)
    with pytest.raises(ValueError, match=r"data.bad_samples=1.5"):
        make_loader(folder, bad_samples=1.5)


# Bad samples


def test_one_percent_is_replaced_the_same_way_and_written_down(make_loader, make_shards, tmp_path: Path) -> None:
    bad = {17, 150}
    folder = make_shards(200, per_shard=90, bad=bad)
    ledger = tmp_path / "run" / "bad" / "rank.jsonl"
    loader = make_loader(folder, ledger_path=ledger)
    first = take(loader, 30)
    assert first[-1].state_after.epoch >= 2
    assert first[-1].bad == 2
    assert flat(first) == flat(take(make_loader(folder), 30)), "a rerun replaces differently"
    samples = [sample for batch in first for pack in batch.packs for sample in pack]
    assert not bad & {sample.sample_id for sample in samples}
    replaced = [sample for sample in samples if sample.occurrence]
    assert {sample.occurrence - 1 for sample in replaced} == bad
    assert len({(s.sample_id, s.epoch, s.occurrence) for s in samples}) == len(samples), "two samples share their noise"
    plan, index = loader._plan, loader._index
    tokens = plan.tokens_of(np.arange(200), 1)
    assert all(tokens[s.sample_id] <= tokens[s.occurrence - 1] for s in replaced)
    assert all(s.sample_id // 90 == (s.occurrence - 1) // 90 for s in replaced), "out of the same shard"
    by_key = {line["key"]: line for line in map(json.loads, ledger.read_text().splitlines())}
    assert sorted(by_key) == ["s0017", "s0150"]
    assert len(ledger.read_text().splitlines()) == 2, "met again in a later epoch it is not written again"
    assert Path(by_key["s0150"]["shard"]).name == "a-000001.tar"
    assert by_key["s0150"]["reason"].startswith("picture does not decode")
    assert (by_key["s0150"]["sample_id"], index.key(150)) == (150, "s0150")


def test_ranks_replace_as_one_process_does(make_loader, make_shards) -> None:
    folder = make_shards(200, bad={17, 150})
    assert global_stream(make_loader, folder, 2, 0, None, 12) == global_stream(make_loader, folder, 1, 0, None, 12)


def test_twenty_percent_stops_and_names_the_last(make_loader, make_shards, tmp_path: Path) -> None:
    folder = make_shards(200, bad=set(range(0, 200, 5)))
    ledger = tmp_path / "bad.jsonl"
    loader = make_loader(folder, ledger_path=ledger)
    with pytest.raises(ValueError, match=r"samples read are bad, more than data.bad_samples=0.01 allows") as caught:
        take(loader, 100)
    last = json.loads(ledger.read_text().splitlines()[-1])
    assert f"sample {last['key']} of shard {last['shard']}: picture does not decode" in str(caught.value)
    assert loader._seen < 60, "found in the first batches, not at the end of an epoch"
    assert "\n" not in str(caught.value)


def test_a_failed_crc_is_a_bad_sample(make_loader, make_shards, tmp_path: Path) -> None:
    folder = make_shards(50)
    shard = folder / "a-000000.tar"
    times = shard.stat()
    data = bytearray(shard.read_bytes())
    data[data.index(b"caption of 33") + 3] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    batches = take(make_loader(folder, ledger_path=tmp_path / "l"), 8)
    assert batches[-1].bad == 1
    line = json.loads((tmp_path / "l").read_text())
    assert line["key"] == "s0033"
    assert "CRC" in line["reason"]


def test_one_bad_sample_does_not_stop_a_small_run_but_a_share_of_none_does(make_loader, make_shards) -> None:
    folder = make_shards(10, bad={4})
    assert take(make_loader(folder), 20)[-1].bad == 1
    with pytest.raises(ValueError, match=r"more than data.bad_samples=0.0 allows.*s0004"):
        take(make_loader(folder, bad_samples=0.0), 20)
    with pytest.raises(ValueError, match=r"2 of \d+ samples read are bad"):
        take(make_loader(make_shards(10, bad={4, 5}, name="b")), 20)


def test_nothing_to_stand_in_is_said(make_loader, make_shards) -> None:
    folder = make_shards(5, bad={0, 1, 2, 3})
    with pytest.raises(ValueError, match=r"cannot be read and no sample that is as short can stand in"):
        take(make_loader(folder, bad_samples=1.0, sizing=Sizing(20, (Stage(0, None),))), 1)


def test_an_index_of_another_size_than_the_picture_is_a_bad_sample(make_loader, make_shards) -> None:
    loader = make_loader(make_shards(30), bad_samples=1.0)
    shapes = loader._index.shapes
    loader._index.shapes = lambda ids: shapes(ids)._replace(height=shapes(ids).height + 8)
    with pytest.raises(ValueError, match="can stand in"):
        take(loader, 20)
    assert len(loader._bad) > 5


def test_budget() -> None:
    assert bad_budget(0.0, 1000, 1000) == 0
    assert bad_budget(0.01, 1797, 1797) == 18
    assert bad_budget(0.01, 10, 10) == 1
    assert bad_budget(0.05, 100, 100) == 5
    assert bad_budget(0.01, 1, 10**6) == 1
    assert bad_budget(1.0, 50, 100) >= 50
    assert bad_budget(0.01, 10_000, 10**9) == 140
    assert next(n for n in range(1, 1000) if n // 5 > bad_budget(0.01, n, 10**6)) <= 20


def test_workers_hand_over_bytes_not_floats(make_loader, make_shards, monkeypatch):
    """A quarter of the bytes through the pipes; and the floats made of them are those of `decode_view`."""
    loader = make_loader(make_shards(4))
    handed = []
    decode = PackDecoder.__call__

    def watched(self, requests):
        packs = decode(self, requests)
        handed.extend((request, raw) for request, raw in zip(requests, packs, strict=True))
        return packs

    monkeypatch.setattr(PackDecoder, "__call__", watched)
    (batch,) = take(loader, 1)
    samples = [sample for pack in batch.packs for sample in pack]
    assert samples
    for sample, (request, raw) in zip(samples, handed, strict=False):
        assert sample.sample_id == request.sample_id
        assert (raw.levels.dtype, raw.levels.nbytes) == (np.uint8, sample.pixels.nbytes // 4)
        expected = decode_view(loader._index.read(sample.sample_id), request.view, 1).pixels
        assert torch.equal(sample.pixels, expected)
