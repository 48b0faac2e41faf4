"""The index of a data set: all shards of a run, and any sample's bytes by number."""

import fnmatch
import hashlib
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from lumina.data.decode import BadSampleError
from lumina.data.shard_index import SAMPLE_COLUMNS, ShardIndex, build_index, index_path, open_index

__all__ = ["Index", "ShardReader", "build_index", "find_shards", "index_path", "index_shards"]


def find_shards(patterns: Sequence[str | Path]) -> list[Path]:
    """The tar files that `patterns` (tar files, folders of them, globs) name, sorted by file name.

    Raises:
        ValueError: a pattern names nothing, or a shard is missing: its index lies there without it, or the
            numbers in a folder have a gap.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            folder, glob = path, "*.tar"
        elif any(sign in path.name for sign in "*?["):
            folder, glob = path.parent, path.name
        elif path.is_file():
            found.add(path.resolve())
            continue
        else:
            raise ValueError(f"data.shards: {pattern} is missing; give a tar file, a folder of tar files or a glob")
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        tars = [name for name in names if name.endswith(".tar") and fnmatch.fnmatchcase(name, glob)]
        if not tars:
            raise ValueError(f"data.shards: {pattern} matches no .tar file")
        _refuse_missing(folder, glob, names, tars, whole_folder=path.is_dir())
        found |= {(folder / name).resolve() for name in tars}
    return sorted(found, key=lambda shard: (shard.name, str(shard)))


def _refuse_missing(folder: Path, glob: str, names: list[str], tars: list[str], whole_folder: bool) -> None:
    suffix = index_path(Path(".tar")).name
    for name in names:
        tar = name.removesuffix(suffix) + ".tar"
        if name.endswith(suffix) and fnmatch.fnmatchcase(tar, glob) and tar not in tars:
            raise ValueError(
                f"shard {folder / tar} is missing: its index is there without it; restore it, or delete both"
            )
    if not whole_folder:
        return
    numbered: dict[tuple[str, int], list[int]] = {}
    for tar in tars:
        if match := re.fullmatch(r"(.*?)(\d+)\.tar", tar):
            numbered.setdefault((match[1], len(match[2])), []).append(int(match[2]))
    for (prefix, digits), numbers in numbered.items():
        gaps = sorted(set(range(min(numbers), max(numbers))) - set(numbers)) if len(numbers) > 1 else []
        if gaps:
            missing = f"{prefix}{gaps[0]:0{digits}d}.tar"
            raise ValueError(
                f"shard {folder / missing} is missing ({len(gaps)} of {max(numbers) - min(numbers) + 1} numbers are); "
                "restore it, or name the shards you mean by a glob"
            )


def index_shards(patterns: Sequence[str | Path], progress: Callable[[int, int], object] | None = None) -> int:
    """Build the indexes that are missing or out of date, as `lumina data index` does.

    Args:
        patterns: tar files, folders of tar files, globs.
        progress: called with (shards done, shards in all) after each shard.

    Returns:
        Number of samples in all the shards. Interrupted, it goes on where it was.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    shards = find_shards(patterns)
    samples = 0
    for done, table in enumerate(_tables(shards, build_missing=True), 1):
        samples += len(table)
        if progress is not None:
            progress(done, len(shards))
    return samples


class ShardReader:
    """Reads samples by number. Small enough to send to another process, and safe to use there.

    Args:
        shards: tar files in the order of the index.
        hashes: SHA-256 of each, as it was when the index was opened.
        starts: int64 (shards + 1,), number of the first sample of each, and the number of samples.
    """

    def __init__(self, shards: Sequence[Path], hashes: Sequence[str], starts: np.ndarray) -> None:
        self.shards, self.hashes = list(shards), list(hashes)
        self.starts = starts
        # A table is some hundred bytes a sample: those of shards in use are kept, not all.
        self._tables: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "hashes": self.hashes, "starts": self.starts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def locate(self, sample_id: int) -> tuple[Path, str]:
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
            try:
                data = os.pread(self._file(shard), size, offset)
            except OSError as error:
                raise ValueError(f"shard {self.shards[shard]} cannot be read ({error.strerror})") from error
            if len(data) != size or zlib.crc32(data) != crc:
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
            table = open_index(self.shards[shard]) if self.shards[shard].is_file() else None
            if table is None or table.shard_sha256 != self.hashes[shard]:
                raise ValueError(f"shard {self.shards[shard]} was removed or changed while it was in use")
            self._tables[shard] = table
            if len(self._tables) > 128:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
            if len(self._files) > 128:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


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
            (table.shard.name, table.shard_sha256, table.shard, [table.columns[name] for name in SAMPLE_COLUMNS])
            for table in tables
        ]
        # By content where names are equal: ids must not depend on the folders the shards lie in.
        parts.sort(key=lambda part: part[:2])
        first_with: dict[str, Path] = {}
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


def _tables(shards: Sequence[Path], build_missing: bool) -> Iterable[ShardIndex]:
    for shard in shards:
        table = open_index(shard)
        if table is None and not build_missing:
            raise ValueError(
                f"shard {shard} has no index that matches it; build it with `lumina data index {shard.parent}`"
            )
        if table is None:
            build_index(shard)
            table = open_index(shard)
        if table is None:
            raise ValueError(f"shard {shard} changed while it was indexed; index it again when it is complete")
        yield table
