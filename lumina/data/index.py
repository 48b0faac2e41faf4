"""The index of the data sets of a run: all shards, the shapes of any samples, and any sample's bytes by number.

What is held does not grow with the samples: a header of each shard, and the tables of those last looked at.
"""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lumina.data.cache import Cache
from lumina.data.decode import BadSampleError
from lumina.data.find import find_shards
from lumina.data.indexing import build_index
from lumina.data.shard_index import ShardHeader, ShardIndex, open_header, open_headers
from lumina.data.sizing import Shapes
from lumina.data.sources import MissingSourceError, Source

__all__ = ["DataSet", "Index", "ShardReader"]

_TABLE_SAMPLES = 2**19  # in tables that are kept, some hundred bytes each; of a rank's lanes all that are in use
_OPEN_SOURCES = 256
_MERGED_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class DataSet:
    """Shards that make one data set, and how many samples come from it in proportion to the others."""

    shards: Sequence[str | Path]
    weight: float = 1.0


@dataclass(frozen=True)
class Access:
    """How shards are reached.

    Attributes:
        cache_dir, cache_bytes: where parts of remote shards are kept, and how much of them; None keeps none.
        index_dir: folder for the indexes of shards that have none beside them; None has none.
        pipe_programs: programs that `pipe:` may run.
    """

    cache_dir: str | None = None
    cache_bytes: int = 10**11
    index_dir: str | None = None
    pipe_programs: tuple[str, ...] = ()


class ShardReader:
    """Reads samples by number. Small enough to send to another process, and safe to use there.

    Args:
        headers: of the shards, in the order of the index.
        starts: int64 (shards + 1,), number of the first sample of each, and the number of samples.
        access: how remote shards are reached.
    """

    def __init__(self, headers: Sequence[ShardHeader], starts: np.ndarray, access: Access) -> None:
        self.headers, self.starts, self.access = list(headers), starts, access
        self._cache = Cache(access.cache_dir, access.cache_bytes) if access.cache_dir is not None else None
        # A table is some hundred bytes a sample: those of shards in use are kept, not all.
        self._tables: OrderedDict[int, ShardIndex] = OrderedDict()
        self._held = 0
        self._sources: OrderedDict[int, Source] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"headers": self.headers, "starts": self.starts, "access": self.access}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)

    def place(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in it) of a sample."""
        if not 0 <= sample_id < self.starts[-1]:
            raise ValueError(f"there is no sample {sample_id}; the data set has samples 0 to {self.starts[-1] - 1}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])

    def locate(self, sample_id: int) -> tuple[Source, str]:
        """(shard, key) of a sample."""
        shard, row = self.place(sample_id)
        return self.headers[shard].source, self.table(shard).key(row)

    def read(self, sample_id: int) -> dict[str, bytes]:
        """Members of a sample: extension without the dot → content.

        Raises:
            BadSampleError: the bytes are not those that were indexed (CRC32).
            ValueError: the shard is gone, or changed since the index was opened.
        """
        shard, row = self.place(sample_id)
        contents = {}
        for extension, offset, size, crc in self.table(shard).members(row):
            data = self._bytes(shard, offset, size)
            if zlib.crc32(data) != crc:
                raise BadSampleError(f".{extension} at byte {offset} does not match its CRC")
            contents[extension] = data
        return contents

    def table(self, shard: int) -> ShardIndex:
        """The index of a shard."""
        if shard not in self._tables:
            self._tables[shard] = self.headers[shard].open()
            self._held += len(self._tables[shard])
            while self._held > _TABLE_SAMPLES and len(self._tables) > 1:
                self._held -= len(self._tables.popitem(last=False)[1])
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        header = self.headers[shard]
        source = header.source
        try:
            if shard not in self._sources:
                if not source.remote and self._changed(header):
                    raise MissingSourceError
                self._sources[shard] = source
                if len(self._sources) > _OPEN_SOURCES:
                    self._sources.popitem(last=False)[1].close()
            self._sources.move_to_end(shard)
            return source.read(offset, size) if self._cache is None else self._cache.read(source, offset, size)
        except MissingSourceError as error:
            raise ValueError(f"shard {source} was removed or changed while it was in use") from error

    def _changed(self, header: ShardHeader) -> bool:
        """Whether a local shard is another than when its header was read."""
        now = open_header(header.source, self.access.index_dir)
        return now is None or now.shard_sha256 != header.shard_sha256


@dataclass(frozen=True)
class Contents:
    """What is in the data sets, as their shards' headers have it.

    Attributes:
        shapes: the distinct ones, each once.
        counts: int64 (distinct,), samples of each shape.
        uncaptioned, unlabelled: samples without a caption, without a label.
        labels: the smallest and the largest label; None without any.
    """

    shapes: Shapes
    counts: np.ndarray
    uncaptioned: int
    unlabelled: int
    labels: tuple[int, int] | None


class Index:
    """The data sets of a run: samples 0 … N-1 over their shards, set after set, sorted by file name within one.

    Attributes:
        hash: 64 hex digits, identity of the data: it changes with any shard's name or content, not with their
            folder or the order they were named in.
        shards: headers of all.
        starts: of each set int64 (shards + 1,), number of the first sample of each shard, and that after the last.
        weights: of each set.
        contents: what is in them.
        reader: what reads samples, to be sent to other processes.
    """

    def __init__(
        self, sets: Sequence[Iterable[ShardHeader]], weights: Sequence[float] = (1.0,), access: Access | None = None
    ) -> None:
        # By content where names are equal: ids must not depend on the folders the shards lie in.
        ordered = [sorted(headers, key=lambda header: (header.source.name, header.shard_sha256)) for headers in sets]
        self.shards = [header for headers in ordered for header in headers]
        first_with: dict[str, Source] = {}
        for header in self.shards:
            if header.shard_sha256 in first_with:
                first = first_with[header.shard_sha256]
                raise ValueError(f"shards {first} and {header.source} hold the same bytes; name one of them")
            first_with[header.shard_sha256] = header.source
        names = [[(header.source.name, header.shard_sha256) for header in headers] for headers in ordered]
        self.hash = hashlib.sha256(repr(names[0] if len(names) == 1 else names).encode()).hexdigest()
        starts = np.cumsum([0, *map(len, self.shards)], dtype=np.int64)
        edges = np.cumsum([0, *(len(headers) for headers in ordered)]).tolist()
        self.starts = [starts[first : stop + 1] for first, stop in pairwise(edges)]
        self.weights = list(weights)
        self.reader = ShardReader(self.shards, starts, access or Access())
        self._edges = edges
        self.contents = _contents(self.shards)

    @classmethod
    def open(
        cls,
        sets: Sequence[DataSet | str | Path],
        access: Access | None = None,
        *,
        build_missing: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> "Index":
        """Open the data sets that `sets` name; paths and patterns alone are one set.

        Args:
            sets: patterns as in `data.shards`, or data sets.
            access: how remote shards are reached.
            build_missing: build an index that is missing or does not match its shard, which reads the whole shard;
                otherwise refuse. Of several ranks let one open with True before the others.
            progress: called with the number of shards opened so far.

        Raises:
            ValueError: a shard is missing, damaged, named twice under two names, or not indexed.
        """
        access = access or Access()
        if not all(isinstance(one, DataSet) for one in sets):
            sets = [DataSet(sets)]
        opened, headers = 0, []
        for one in sets:
            sources = find_shards(one.shards, pipe_programs=access.pipe_programs)
            headers.append([])
            for source, header in zip(sources, open_headers(sources, access.index_dir), strict=True):
                headers[-1].append(header or _indexed(source, access, build_missing))
                opened += 1
                if progress is not None:
                    progress(opened)
        return cls(headers, [one.weight for one in sets], access)

    def __len__(self) -> int:
        return int(self.reader.starts[-1])

    def contents_of(self, number: int) -> Contents:
        """What is in data set `number`."""
        first, stop = self._edges[number : number + 2]
        return self.contents if len(self.starts) == 1 else _contents(self.shards[first:stop])

    def shapes(self, ids: np.ndarray) -> Shapes:
        """Shapes of samples, int64 ids (n,)."""
        ids = np.asarray(ids, np.int64)
        found = np.empty((4, len(ids)), np.int64)
        shards = np.searchsorted(self.reader.starts, ids, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            rows = ids[here] - self.reader.starts[shard]
            columns = self.reader.table(shard).columns
            for i, name in enumerate(Shapes._fields):
                found[i, here] = columns[name][rows]
        return Shapes(*found)

    def column(self, name: str) -> np.ndarray:
        """A column of all samples (`SAMPLE_COLUMNS`), (N,): for tools, as it grows with the samples."""
        return np.concatenate([header.open().columns[name] for header in self.shards])

    def key(self, sample_id: int) -> str:
        """Key of a sample, unique within its shard."""
        return self.reader.locate(sample_id)[1]

    def name(self, sample_id: int) -> str:
        """What to call a sample in messages."""
        shard, key = self.reader.locate(sample_id)
        return f"sample {key} of {shard.name}"

    def read(self, sample_id: int) -> dict[str, bytes]:
        """Members of a sample, checked; see `ShardReader.read`."""
        return self.reader.read(sample_id)

    def find(self, wrong: Callable[[ShardIndex], np.ndarray]) -> int | None:
        """The first sample for which `wrong` of its shard's table, a bool (samples,), is true; reads all tables."""
        for shard, start in enumerate(self.reader.starts[:-1].tolist()):
            rows = wrong(self.reader.table(shard)).nonzero()[0]
            if len(rows):
                return start + int(rows[0])
        return None


def _contents(headers: Iterable[ShardHeader]) -> Contents:
    uncaptioned = unlabelled = waiting = 0
    labels: list[int] = []
    tables = [(np.empty(0, np.int64),) * 3]
    for header in headers:
        kind, height, width, frames, counts = header.shapes.T.astype(np.int64)
        tables.append((height << 32 | width, frames << 8 | kind, counts))
        waiting += len(counts)
        # Now and then: where pictures have any size, the tables of all shards are as long as the data set.
        if waiting > _MERGED_AT_ONCE:
            tables, waiting = [_merged(tables)], 0
        uncaptioned += header.uncaptioned
        unlabelled += header.unlabeled
        labels += header.labels or ()
    areas, others, counts = _merged(tables)
    shapes = Shapes(others & 0xFF, areas >> 32, areas & 0xFFFFFFFF, others >> 8)
    return Contents(shapes, counts, uncaptioned, unlabelled, (min(labels), max(labels)) if labels else None)


def _merged(tables: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Tables (area, other, count) as one, int64 (distinct,) each: each pair of the first two once, counts added up."""
    areas, others, counts = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    # Each table is in order of the areas, and a stable sort only merges what is.
    order = np.argsort(areas, kind="stable")
    if len(others) and (others != others[0]).any():
        order = order[np.argsort(others[order], kind="stable")]
    areas, others, counts = areas[order], others[order], counts[order]
    first = np.ones(len(order), bool)
    first[1:] = (areas[1:] != areas[:-1]) | (others[1:] != others[:-1])
    starts = first.nonzero()[0]
    return areas[starts], others[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def _indexed(source: Source, access: Access, build_missing: bool) -> ShardHeader:
    if not build_missing:
        raise ValueError(f"shard {source} has no index that matches it; build it with `lumina data index {source}`")
    build_index(source, access.index_dir)
    header = open_header(source, access.index_dir)
    if header is None:
        raise ValueError(f"shard {source} changed while it was indexed; index it again when it is complete")
    return header
