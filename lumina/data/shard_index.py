"""The index of one shard: what lies where in the tar, in a safetensors file beside it or in a folder of indexes."""

import base64
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lumina.data.sources import LocalSource, MissingSourceError, Source, source_of

VERSION = "2"
SUFFIX = ".index.safetensors"
KINDS = ("image", "video", "audio", "latent")
"""What a sample is; the column `kind` holds the place in this list."""
SAMPLE_COLUMNS = {
    "kind": np.int8,
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "duration": np.float32,
    "caption_length": np.int32,
    "label": np.int64,
}
UNREADABLE = -2
"""In the column `label`: there may be one, but it or its .json does not read. -1 is none, as of `caption_length`."""
MEMBER_COLUMNS = {"extension": np.int16, "offset": np.int64, "size": np.int64, "crc32": np.uint32}
# Where the samples' keys (UTF-8, one after another) and members begin; one entry more than there are samples.
_START_COLUMNS = {"key_start": np.int64, "member_start": np.int64}
COLUMNS = {**SAMPLE_COLUMNS, **MEMBER_COLUMNS, **_START_COLUMNS, "key_bytes": np.uint8}
_DTYPE_NAMES = {
    np.dtype(dtype): name
    for name, dtype in {
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "F32": np.float32,
        "U8": np.uint8,
        "U32": np.uint32,
    }.items()
}
_FIRST_READ = 1 << 16


class DamagedIndexError(ValueError):
    """A column of an index does not match its hash; the index must be built anew."""


class _Columns(Mapping[str, np.ndarray]):
    """Columns of an index file, each read and checked when it is first asked for."""

    def __init__(self, index: Source, start: int, tensors: Mapping[str, Any], sums: Mapping[str, str]) -> None:
        self._index, self._start, self._tensors, self._sums = index, start, tensors, sums
        self._read: dict[str, np.ndarray] = {}
        self._whole: bytes | None = None

    def __len__(self) -> int:
        return len(COLUMNS)

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            tensor = self._tensors[name]
            first, last = tensor["data_offsets"]
            data = self._bytes(first, last)
            column = np.frombuffer(data, COLUMNS[name])
            if column_sum(column) != self._sums[name]:
                raise DamagedIndexError(
                    f"the index {self._index} is damaged, or another since it was opened; build it anew with "
                    "`lumina data index` and start again"
                )
            self._read[name] = column
        return self._read[name]

    def _bytes(self, first: int, last: int) -> bytes:
        if not self._index.remote:
            try:
                return self._index.read(self._start + first, last - first)
            finally:
                self._index.close()  # or a run would hold a file open for every shard there is
        # One request for all of them.
        if self._whole is None:
            end = max(tensor["data_offsets"][1] for tensor in self._tensors.values())
            self._whole = self._index.read(self._start, end)
        return self._whole[first:last]


@dataclass(frozen=True)
class ShardHeader:
    """What an index says of its shard before any column is read.

    Attributes:
        source: the shard.
        index: the file or object that the index is.
        samples: number of them.
        shard_size, shard_sha256: bytes of the tar, and their SHA-256, when it was indexed.
        identity: of the shard then (`Source.identity`); None where the index was built beside a local shard.
        extensions: of its members, without the dot.
        uncaptioned, unlabeled: samples without a caption, without a label.
        labels: smallest and largest; None if there are none.
    """

    source: Source
    index: Source
    samples: int
    shard_size: int
    shard_sha256: str
    identity: str | None
    extensions: tuple[str, ...]
    uncaptioned: int
    unlabeled: int
    labels: tuple[int, int] | None
    _shapes: str = field(repr=False)
    _columns: tuple[int, Mapping[str, Any], Mapping[str, str]] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return self.samples

    @property
    def shapes(self) -> np.ndarray:
        """int32 (distinct, 5), ascending: kind, height, width, frames, and the number of samples with these."""
        # Not kept: over the shards of a large data set it would be most of what an index holds.
        data = zlib.decompress(base64.b64decode(self._shapes))
        return np.frombuffer(data, "<i4").reshape(5, -1).T

    def open(self) -> "ShardIndex":
        """The index with its columns, each read and checked when first used (`DamagedIndexError`)."""
        return ShardIndex(self, _Columns(self.index, *self._columns))


@dataclass(frozen=True)
class ShardIndex:
    """Header and columns of one shard's index."""

    header: ShardHeader
    columns: Mapping[str, np.ndarray]

    @property
    def source(self) -> Source:
        """The shard."""
        return self.header.source

    def checked(self) -> "ShardIndex":
        """The same with all columns read; `DamagedIndexError` if one of them is damaged."""
        for name in COLUMNS:
            self.columns[name]
        return self

    def __len__(self) -> int:
        return self.header.samples

    def key(self, row: int) -> str:
        """Key of sample `row` of this shard."""
        start, stop = self.columns["key_start"][row : row + 2]
        return self.columns["key_bytes"][start:stop].tobytes().decode("utf-8", "surrogateescape")

    def members(self, row: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, size, crc32) of each member of sample `row`; offset and size in bytes."""
        start, stop = (int(edge) for edge in self.columns["member_start"][row : row + 2])
        table = (self.columns[name][start:stop].tolist() for name in MEMBER_COLUMNS)
        extensions = self.header.extensions
        return [(extensions[code], offset, size, crc) for code, offset, size, crc in zip(*table, strict=True)]


def index_path(shard: Path) -> Path:
    """Where the index of `digits-000000.tar` lies: `digits-000000.index.safetensors` beside it."""
    return shard.with_name(shard.name.removesuffix(".tar") + SUFFIX)


def index_path_in(index_dir: str | Path, source: Source) -> Path:
    """Where in a folder of indexes that of `source` lies."""
    stem = source.name.removesuffix(".tar")
    stem = "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in stem)[:100]
    location = str(source.path.resolve()) if isinstance(source, LocalSource) else source.location
    digest = hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(index_dir) / f"{stem}-{digest}{SUFFIX}"


def open_header(source: Source | str | Path, index_dir: str | Path | None = None) -> ShardHeader | None:
    """The header of a shard's index; None if there is no index that belongs to the shard as it is now.

    An index beside a local shard belongs to it if it is no older and says its size; one in `index_dir`, if it says its
    identity; one beside a remote shard, if it says its identity, or was built beside a local copy and says its size.
    Its header is checked by a hash.

    Args:
        source: the shard.
        index_dir: folder of indexes that could not be put beside their shards.

    Raises:
        ValueError: the shard is missing, or shard or index cannot be reached.
    """
    source = source_of(source)
    if isinstance(source, LocalSource):
        return _beside_local(source) or (_in_folder(source, index_dir) if index_dir is not None else None)
    header = _in_folder(source, index_dir) if index_dir is not None else None
    if header is None and (index := source.beside(index_path(Path(source.name)).name)) is not None:
        try:
            header = parse_header(source, index)
        except MissingSourceError:
            return None
        if header is not None and header.identity is None:
            return header if header.shard_size == source.size() else None
    return header if header is not None and header.identity == source.identity() else None


def open_headers(
    sources: Sequence[Source], index_dir: str | Path | None = None, threads: int = 16
) -> list[ShardHeader | None]:
    """`open_header` of each, several at once where they are remote."""
    if not any(source.remote for source in sources):
        return [open_header(source, index_dir) for source in sources]
    with ThreadPoolExecutor(threads, thread_name_prefix="index-headers") as pool:
        return list(pool.map(lambda source: open_header(source, index_dir), sources))


def open_index(source: Source | str | Path, index_dir: str | Path | None = None) -> ShardIndex | None:
    """As `open_header`, with all columns read and checked; None also if one of them is damaged."""
    header = open_header(source, index_dir)
    if header is None:
        return None
    try:
        return header.open().checked()
    except DamagedIndexError:
        return None
    finally:
        header.index.close()


def _beside_local(source: LocalSource) -> ShardHeader | None:
    stat, path = source.stat(), index_path(source.path)
    try:
        if path.stat().st_mtime_ns < stat.st_mtime_ns:
            return None
    except FileNotFoundError:
        return None
    header = parse_header(source, LocalSource(path))
    return header if header is not None and header.shard_size == stat.st_size else None


def _in_folder(source: Source, index_dir: str | Path) -> ShardHeader | None:
    path = index_path_in(index_dir, source)
    header = parse_header(source, LocalSource(path)) if path.is_file() else None
    return header if header is not None and header.identity == source.identity() else None


def parse_header(source: Source, index: Source) -> ShardHeader | None:
    """The header in an index file, whether or not the shard is still as it says; None if it is damaged or too old."""
    try:
        size = index.size()
        text = index.read(0, min(size, _FIRST_READ))
        start = 8 + int.from_bytes(text[:8], "little")
        if not 8 < start <= size:
            return None
        if start > len(text):
            text += index.read(len(text), start - len(text))
    finally:
        index.close()
    try:
        tensors = json.loads(text[8:start])
        digest, _, said = tensors.pop("__metadata__")["index"].partition(" ")
        if hashlib.sha256(said.encode()).hexdigest() != digest:
            return None
        facts = json.loads(said)
        whole = set(tensors) == set(COLUMNS) and all(
            _is_column(tensors[name], np.dtype(dtype), size - start) for name, dtype in COLUMNS.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not whole or facts.pop("version") != VERSION:
        return None
    sums = facts.pop("sums")
    facts["extensions"] = tuple(facts["extensions"])
    facts["labels"] = tuple(facts["labels"]) if facts["labels"] else None
    return ShardHeader(source, index, _shapes=facts.pop("shapes"), _columns=(start, tensors, sums), **facts)


def _is_column(tensor: Mapping[str, Any], dtype: np.dtype, room: int) -> bool:
    """Whether a safetensors entry says in every part what a column's does."""
    first, last = tensor["data_offsets"]
    length, rest = divmod(last - first, dtype.itemsize)
    said = {"dtype": _DTYPE_NAMES[dtype], "shape": [length], "data_offsets": [first, last]}
    return 0 <= first <= last <= room and not rest and tensor == said


def column_sum(column: np.ndarray) -> str:
    """Hash of a column: safetensors checks no contents, and a flipped bit in an offset would make a good shard bad."""
    digest = hashlib.sha256(f"{column.dtype}:{len(column)};".encode())
    digest.update(column.tobytes())
    return digest.hexdigest()


def write_index(
    target: Path,
    columns: Mapping[str, np.ndarray],
    *,
    size: int,
    sha256: str,
    identity: str | None,
    extensions: Sequence[str],
) -> None:
    """Write an index file; it appears complete or not at all. `OSError` where it cannot be written."""
    labels = columns["label"][columns["label"] >= 0]
    facts = {
        "version": VERSION,
        "samples": len(columns["label"]),
        "shard_size": size,
        "shard_sha256": sha256,
        "identity": identity,
        "extensions": list(extensions),
        "uncaptioned": int((columns["caption_length"] < 0).sum()),
        "unlabeled": int((columns["label"] == -1).sum()),
        "labels": [int(labels.min()), int(labels.max())] if len(labels) else None,
        "shapes": _histogram(columns),
        "sums": {name: column_sum(columns[name]) for name in COLUMNS},
    }
    said = json.dumps(facts)
    # One entry: safetensors writes several in random order, and equal shards should have equal indexes.
    metadata = {"index": f"{hashlib.sha256(said.encode()).hexdigest()} {said}"}
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as stream:
            stream.write(save(dict(columns), metadata))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _histogram(columns: Mapping[str, np.ndarray]) -> str:
    # Packed: where every picture has a size of its own it would be most of the header.
    shapes = np.stack([columns[name].astype(np.int32) for name in ("kind", "height", "width", "frames")], axis=1)
    distinct, counts = np.unique(shapes, axis=0, return_counts=True)
    table = np.concatenate([distinct, counts[:, None]], axis=1).astype("<i4")
    return base64.b64encode(zlib.compress(np.ascontiguousarray(table.T).tobytes())).decode()
