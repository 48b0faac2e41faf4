"""Indexes of shards that hold nothing, to measure how a large data set starts."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lumina.benchmark.pipelines import MULTIPLE, plan_of
from lumina.benchmark.processes import cpu_seconds
from lumina.data.index import Index
from lumina.data.shard_index import index_path, write_index
from lumina.data.sizing import Sizing, Stage
from lumina.parallel.peak_memory import peak_resident_bytes

PER_SHARD = 10_000
PACKS = 512
"""Of a global batch; and lanes."""
TOKENS_PER_PACK = 4096
SHUFFLE_WINDOW = 2048
RESOLUTION = 256
FURTHER_BATCHES = 100
_LONG_SIDES = np.array([640, 720, 768, 800, 900, 1000, 1024, 1200, 1280, 1600, 1920, 2048])


@dataclass(frozen=True)
class IndexRow:
    """What a fresh process took to start on a data set; seconds of the clock and of the cores."""

    samples: int
    shards: int
    distinct_sizes: int
    open_seconds: float
    plan_seconds: float
    first_batch_seconds: float
    further_batches_seconds: float
    start_cpu_seconds: float
    imported_bytes: int
    peak_bytes: int  # after the first batch
    final_peak_bytes: int
    all_usable: bool
    first_batch_samples: int
    waste: float


def indexes(folder: Path, samples: int) -> Path:
    """The folder below `folder` with the indexes of `write_indexes`, which are written unless they are there.

    Raises:
        ValueError: it cannot be written, or is there and incomplete.
    """
    target = folder / f"synthetic-{samples}"
    complete = target / "complete"
    if not target.exists():
        try:
            write_indexes(target, samples)
            complete.touch()
        except OSError as error:
            raise ValueError(f"--dir {folder} cannot be written to ({error.strerror})") from error
    if not complete.exists():
        raise ValueError(f"{target} is there and was not made to the end; remove it, or name another --dir")
    return target


def write_indexes(folder: Path, samples: int) -> None:
    """Indexes of `samples` pictures with captions, `PER_SHARD` a shard, beside tar files that are holes.

    Pictures are 256 to 2048 pixels long: seven in ten have one of twelve long sides and any short one, three any two
    sides, so that sizes hardly repeat, which is the hard case.
    """
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, samples, PER_SHARD)):
        count = min(PER_SHARD, samples - first)
        draws = np.random.default_rng(number)
        shard = folder / f"synthetic-{number:06d}.tar"
        columns, size = _columns(draws, first, count)
        with shard.open("wb") as stream:
            stream.truncate(size)
        digest = draws.bytes(32).hex()
        write_index(
            index_path(shard), columns, size=size, sha256=digest, identity=None, extensions=("jpg", "json", "txt")
        )


def _columns(draws: np.random.Generator, first: int, count: int) -> tuple[dict[str, np.ndarray], int]:
    """Columns of a shard's index, and bytes of the shard."""
    long = np.where(draws.random(count) < 0.7, draws.choice(_LONG_SIDES, count), draws.integers(512, 2049, count))
    short = (long * draws.uniform(0.5, 1, count)).astype(np.int64)
    lying = draws.random(count) < 0.6
    captions = draws.integers(20, 400, count)
    sizes = np.stack((long * short // 4, np.full(count, 120), captions), 1)
    places = np.cumsum(512 + -(-sizes // 512) * 512) - (-(-sizes // 512) * 512).ravel()
    keys = [f"{first + row:09d}".encode() for row in range(count)]
    columns = {
        "kind": np.zeros(count, np.int8),
        "height": np.where(lying, short, long).astype(np.int32),
        "width": np.where(lying, long, short).astype(np.int32),
        "frames": np.ones(count, np.int32),
        "duration": np.zeros(count, np.float32),
        "caption_length": captions.astype(np.int32),
        "label": np.full(count, -1, np.int64),
        "extension": np.tile(np.arange(3, dtype=np.int16), count),
        "offset": places.astype(np.int64),
        "size": sizes.ravel().astype(np.int64),
        "crc32": draws.integers(0, 2**32, 3 * count, dtype=np.uint32),
        "key_start": np.arange(count + 1, dtype=np.int64) * 9,
        "member_start": np.arange(count + 1, dtype=np.int64) * 3,
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
    }
    return columns, int(places[-1] + sizes[-1, -1]) + 1024


def measured_index(folder: Path) -> IndexRow:
    """Opens the index, plans, and draws global batches; to be called in a fresh process."""
    imports, used, start = peak_resident_bytes(), cpu_seconds(), time.perf_counter()
    index = Index.open([folder], build_missing=False)
    opened = time.perf_counter()
    sizing = Sizing(MULTIPLE, (Stage(0, RESOLUTION),))
    smallest = sizing.sizes(index.contents.shapes, 0)[0].min()  # a run looks at all there is before it starts
    plan = plan_of(index, sizing, TOKENS_PER_PACK, PACKS, SHUFFLE_WINDOW)
    planned = time.perf_counter()
    packs, state = plan.batch(plan.start(index.hash))
    drawn = time.perf_counter()
    used, peak = cpu_seconds() - used, peak_resident_bytes()
    begin = time.perf_counter()
    for step in range(FURTHER_BATCHES):
        _, state = plan.batch(state, step + 2)
    further = time.perf_counter() - begin
    return IndexRow(
        samples=len(index),
        shards=len(index.shards),
        distinct_sizes=len(index.contents.counts),
        open_seconds=opened - start,
        plan_seconds=planned - opened,
        first_batch_seconds=drawn - planned,
        further_batches_seconds=further,
        start_cpu_seconds=used,
        imported_bytes=imports,
        peak_bytes=peak,
        final_peak_bytes=peak_resident_bytes(),
        all_usable=bool(smallest > 0),
        first_batch_samples=sum(map(len, packs)),
        waste=plan.waste(state, 1),
    )
