"""A replica's packs are read, decoded and encoded by one of its ranks."""

import os

import pytest

from lumina.data.write import write_shards
from tests.parallel.runs import tiny_config, train_tree
from tests.parallel.test_shared_packs import shards  # noqa: F401 - a fixture
from tests.parallel.workers import free_port, run_ranks
from tests.unit.test_encode import picture

LAYOUTS = {
    "tensor and ring": {"tensor": 2, "ring": 2, "zero_stage": 0},
    "pipeline": {"pipeline": 2, "zero_stage": 1},
    "data": {"zero_stage": 1},
}


def what_was_done(rank, trees):
    """Of each run: samples decoded and captions encoded by this rank."""
    from lumina.data.workers import PackDecoder
    from lumina.encoders.text import BytesEncoder

    counts = {"decoded": 0, "captions": 0}

    def counted(name, function, size):
        def wrapper(self, *arguments):
            counts[name] += size(*arguments)
            return function(self, *arguments)

        return wrapper

    PackDecoder.__call__ = counted("decoded", PackDecoder.__call__, len)
    BytesEncoder.__call__ = counted("captions", BytesEncoder.__call__, len)
    found = []
    for tree, port in trees:
        os.environ["MASTER_PORT"] = str(port)
        counts |= dict.fromkeys(counts, 0)
        train_tree(rank, tree)
        found.append(dict(counts))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_reads_for_all(world, shards, tmp_path):  # noqa: F811
    chosen = ["tensor and ring"] if world == 4 else ["pipeline", "data"]
    trees = [
        (tiny_config(tmp_path / name, shards, parallel=LAYOUTS[name], data__bad_samples=0.5), free_port())
        for name in chosen
    ]
    ranks = run_ranks(world, what_was_done, trees)
    for i, name in enumerate(chosen):
        leader, *others = [found[i] for found in ranks]
        assert leader["decoded"] > 15
        assert leader["captions"] > 15
        for other in others:
            if name == "data":
                assert other["decoded"] > 5
            else:
                assert (other["decoded"], other["captions"]) == (0, 0)


def refused(rank, tree):
    """What a run whose data are too bad says on this rank."""
    try:
        train_tree(rank, tree)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_all_ranks_stop_where_one_cannot_read(tmp_path):
    samples = [{"__key__": f"s{i}", "png": b"\x89PNG\r\n\x1a\nnothing", "txt": "x"} for i in range(20)]
    samples[3]["png"] = picture(0, 8, 8)
    write_shards(tmp_path / "bad", samples, name="bad", samples_per_shard=100)
    tree = tiny_config(tmp_path / "run", tmp_path / "bad", parallel={"ring": 2, "zero_stage": 0})
    first, second = run_ranks(2, refused, tree)
    assert "samples read are bad, more than data.bad_samples=0.01 allows" in first
    assert second == f"rank 0, which reads for this one: {first}"
