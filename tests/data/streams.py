"""Whole data paths for the tests: shards in memory, and the stream of all ranks put together again."""

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lumina.data.index import Index
from lumina.data.loader import Batch, Loader, Sample
from lumina.data.plan import DataState
from lumina.data.shard_index import COLUMNS, KINDS, ShardHeader, ShardIndex
from lumina.data.sources import Source

SIZES = ((8, 8), (8, 12), (16, 8), (12, 12), (4, 20))
"""Height and width of the samples, one after another; 6 to 12 tokens of 4×4 pixels and a nextline token a row."""


class MemorySource(Source):
    """A shard in memory, which counts as remote, so that no file is looked for."""

    def __init__(self, location: str, content: bytes) -> None:
        self.location, self.content = location, content

    def size(self) -> int:
        return len(self.content)

    def identity(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]

    def stream(self) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self.content))

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class MemoryHeader(ShardHeader):
    """A shard in memory with its index."""

    columns: dict[str, np.ndarray]

    @property
    def shapes(self) -> np.ndarray:
        return np.zeros((0, 5), np.int32)

    def open(self) -> ShardIndex:
        return ShardIndex(self, self.columns)


def pixels_at(number: int, row: int) -> np.ndarray:
    """Levels (height, width, 1) of a sample of a memory shard."""
    height, width = SIZES[(number + row) % len(SIZES)]
    return (np.arange(height * width).reshape(height, width, 1) * 7 + 31 * number + row).astype(np.uint8)


def memory_shard(name: str, number: int, samples: int) -> MemoryHeader:
    """A shard whose samples have the keys NUMBER-ROW and the pixels of `pixels_at`."""
    content, offsets, sizes, sums, keys = b"", [], [], [], []
    for row in range(samples):
        stream = io.BytesIO()
        np.save(stream, pixels_at(number, row), allow_pickle=False)
        for data in (stream.getvalue(), f"caption {number}-{row}".encode()):
            offsets.append(len(content))
            sizes.append(len(data))
            sums.append(zlib.crc32(data))
            content += data
        keys.append(f"{number}-{row}".encode())
    shapes = [SIZES[(number + row) % len(SIZES)] for row in range(samples)]
    ones = np.ones(samples)
    columns = {
        "kind": ones * KINDS.index("image"),
        "height": [height for height, _ in shapes],
        "width": [width for _, width in shapes],
        "frames": ones,
        "duration": ones * 0,
        "caption_length": ones,
        "label": -ones,
        "extension": [0, 1] * samples,
        "offset": offsets,
        "size": sizes,
        "crc32": sums,
        "key_start": np.cumsum([0, *map(len, keys)]),
        "member_start": np.arange(samples + 1) * 2,
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
    }
    columns = {key: np.asarray(values).astype(COLUMNS[key]) for key, values in columns.items()}
    source = MemorySource(f"memory://{name}", content)
    facts = (samples, len(content), source.identity(), None, ("npy", "txt"), 0, samples, None)
    return MemoryHeader(source, source, *facts, "", (0, {}, {}), columns=columns)


def everything(sample: Sample) -> tuple:
    """All of a sample, arrays as bytes."""
    arrays = (sample.pixels, sample.latent, sample.text, sample.null_text)
    arrays = tuple(None if array is None else (tuple(array.shape), array.numpy().tobytes()) for array in arrays)
    return (sample.sample_id, sample.epoch, sample.occurrence, sample.key, sample.caption, sample.label, *arrays)


def take(loader: Loader, batches: int) -> list[Batch]:
    stream = iter(loader)
    try:
        return [next(stream) for _ in range(batches)]
    finally:
        stream.close()


def samples_of(batches: Sequence[Batch]) -> list[Sample]:
    return [sample for batch in batches for pack in batch.packs for sample in pack]


def global_stream(
    open_loader: Callable[..., Loader], world: int, state: DataState | None, batches: int, **options: object
) -> tuple[list[list[tuple]], DataState]:
    """The packs of all ranks in the global order, and the state after them, which has been through JSON.

    Args:
        open_loader: called with (rank, world, state=state, **options).
    """
    ranks = [take(open_loader(rank, world, state=state, **options), batches) for rank in range(world)]
    packs = []
    for step in zip(*ranks, strict=True):
        assert len({batch.state_after for batch in step}) == 1, "ranks disagree where the stream stands"
        places = zip(*(batch.packs for batch in step), strict=True)
        here = [[everything(sample) for sample in pack] for place in places for pack in place]
        assert {batch.global_samples for batch in step} == {sum(map(len, here))}
        packs += here
    state = ranks[0][-1].state_after
    return packs, DataState.from_dict(json.loads(json.dumps(state.to_dict())))


def each_once(packs: Sequence[Sequence[tuple]], state: DataState, index: Index) -> list[int]:
    """Assert that no id came twice in an epoch and none is missing of the epochs that are over.

    Returns:
        Of each set the number of epochs that every lane has ended.
    """
    served = [sample[:2] for pack in packs for sample in pack]
    assert {sample[2] for pack in packs for sample in pack} <= {0}
    waiting = [place for lane in state.lanes for place in lane.waiting]
    places = served + waiting
    assert len(set(places)) == len(places), "an id came twice in an epoch"
    ended = []
    for number, starts in enumerate(index.starts):
        ids = range(starts[0], starts[-1])
        ended.append(min(lane.at[number][0] for lane in state.lanes))
        for epoch in range(ended[-1]):
            assert {i for i, e in places if e == epoch and i in ids} == set(ids), f"set {number}, epoch {epoch}"
    return ended
