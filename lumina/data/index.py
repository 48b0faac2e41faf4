"""The index of a data set: all shards of a run, and any sample's bytes by number."""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lumina.data.decode import BadSampleError
from lumina.data.find import find_shards
from lumina.data.indexing import build_index, index_shards
from lumina.data.shard_index import ShardIndex, index_path, open_index
from lumina.data.sources import MissingSourceError, Source

_COLUMNS = ("height", "width", "frames", "caption_length", "label")

__all__ = ["Index", "ShardReader", "build_index", "find_shards", "index_path", "index_shards"]


class ShardReader:
    """Reads samples by number. Small enough to send to another process, and safe to use there.

    Args:
        shards: tar files in the order of the index.
        hashes: SHA-256 of each, as it was when the index was opened.
        starts: int64 (shards + 1,), number of the first sample of each, and the number of samples.
    """

    def __init__(self, shards: Sequence[Source], hashes: Sequence[str], starts: np.ndarray) -> None:
        self.shards, self.hashes = list(shards), list(hashes)
        self.starts = starts
        # A table is some hundred bytes a sample: those of shards in use are kept, not all.
        self._tables: OrderedDict[int, ShardIndex] = OrderedDict()
        self._in_use: OrderedDict[int, Source] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "hashes": self.hashes, "starts": self.starts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)

    def locate(self, sample_id: int) -> tuple[Source, str]:
        """(shard, key) of a sample."""
        shard, row = self._place(sample_id)
        return self.shards[shard], self._table(shard).key(row)

    def read(self, sample_id: int) -> dict[str, bytes]:
        """Members of a sample: extension without the dot → content.

        Raises:
            BadSampleError: the bytes are not those that were indexed (CRC32).
            ValueError: the shard is gone, or changed since the index was opened.
        """
        shard, row = self._place(sample_id)
        contents = {}
        for extension, offset, size, crc in self._table(shard).members(row):
            data = self._source(shard).read(offset, size)
            if zlib.crc32(data) != crc:
                raise BadSampleError(f".{extension} at byte {offset} does not match its CRC")
            contents[extension] = data
        return contents

    def _place(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.starts[-1]:
            raise ValueError(f"there is no sample {sample_id}; the data set has samples 0 to {self.starts[-1] - 1}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])

    def _table(self, shard: int) -> ShardIndex:
        if shard not in self._tables:
            try:
                table = open_index(self.shards[shard])
            except MissingSourceError:
                table = None
            if table is None or table.header.shard_sha256 != self.hashes[shard]:
                raise ValueError(f"shard {self.shards[shard]} was removed or changed while it was in use")
            self._tables[shard] = table
            if len(self._tables) > 128:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _source(self, shard: int) -> Source:
        if shard not in self._in_use:
            self._in_use[shard] = self.shards[shard]
            if len(self._in_use) > 128:
                self._in_use.popitem(last=False)[1].close()
        self._in_use.move_to_end(shard)
        return self._in_use[shard]


class Index:
    """A data set: samples 0 … N-1 over its shards, sorted by file name.

    Attributes:
        hash: 64 hex digits, identity of the data: it changes with any shard's name or content, not with their
            folder or the order they were named in.
        heights, widths, frames: int32 (N,), pixels and frames; height and width 0 where the picture's header is bad.
        caption_lengths: int32 (N,), characters; -1 without a caption.
        labels: int64 (N,); -1 without a label.
        reader: what reads samples, to be sent to other processes.
    """

    def __init__(self, tables: Iterable[ShardIndex]) -> None:
        parts = [
            (table.source.name, table.header.shard_sha256, table.source, [table.columns[name] for name in _COLUMNS])
            for table in tables
        ]
        # By content where names are equal: ids must not depend on the folders the shards lie in.
        parts.sort(key=lambda part: part[:2])
        first_with: dict[str, Source] = {}
        for _, sha256, shard, _ in parts:
            if sha256 in first_with:
                raise ValueError(f"shards {first_with[sha256]} and {shard} hold the same bytes; name one of them")
            first_with[sha256] = shard
        self.hash = hashlib.sha256(repr([part[:2] for part in parts]).encode()).hexdigest()
        columns = [np.concatenate(column) for column in zip(*(part[3] for part in parts), strict=True)]
        self.heights, self.widths, self.frames, self.caption_lengths, self.labels = columns
        starts = np.cumsum([0, *(len(part[3][0]) for part in parts)], dtype=np.int64)
        self.reader = ShardReader([part[2] for part in parts], [part[1] for part in parts], starts)

    @classmethod
    def open(cls, patterns: Sequence[str | Path], build_missing: bool = True) -> "Index":
        """Open the shards that `patterns` (tar files, folders, globs) name.

        Args:
            patterns: as in `data.shards`.
            build_missing: build an index that is missing or does not match its shard, which reads the whole shard;
                otherwise refuse. Of several ranks let one open with True before the others.

        Raises:
            ValueError: a shard is missing, damaged, named twice under two names, or not indexed.
        """
        return cls(_tables(find_shards(patterns), build_missing))

    def __len__(self) -> int:
        return int(self.reader.starts[-1])

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


def _tables(shards: Sequence[Source], build_missing: bool) -> Iterable[ShardIndex]:
    for shard in shards:
        table = open_index(shard)
        if table is None and not build_missing:
            raise ValueError(f"shard {shard} has no index that matches it; build it with `lumina data index {shard}`")
        if table is None:
            build_index(shard)
            table = open_index(shard)
        if table is None:
            raise ValueError(f"shard {shard} changed while it was indexed; index it again when it is complete")
        yield table
