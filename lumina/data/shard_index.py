"""The index of one shard: what lies where in the tar, in a safetensors file beside it."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lumina.data.decode import (
    IMAGE_EXTENSIONS,
    BadSampleError,
    caption_of,
    image_size,
    label_of,
    parse_json,
)
from lumina.data.tarwalk import Member, TarWalk

VERSION = "1"
SAMPLE_COLUMNS = {
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "caption_length": np.int32,
    "label": np.int64,
}
MEMBER_COLUMNS = {"extension": np.int16, "offset": np.int64, "size": np.int64, "crc32": np.uint32}
# Where the samples' keys (UTF-8, one after another) and members begin; one entry more than there are samples.
_START_COLUMNS = {"key_start": np.int64, "member_start": np.int64}
_COLUMNS = {**SAMPLE_COLUMNS, **MEMBER_COLUMNS, **_START_COLUMNS, "key_bytes": np.uint8}


@dataclass(frozen=True)
class ShardIndex:
    """Columns of one shard, and the size in bytes and SHA-256 its tar had when it was indexed."""

    shard: Path
    shard_size: int
    shard_sha256: str
    extensions: tuple[str, ...]
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["height"])

    def key(self, row: int) -> str:
        """Key of sample `row` of this shard."""
        start, stop = self.columns["key_start"][row : row + 2]
        return self.columns["key_bytes"][start:stop].tobytes().decode("utf-8", "surrogateescape")

    def members(self, row: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, size, crc32) of each member of sample `row`; offset and size in bytes."""
        start, stop = (int(edge) for edge in self.columns["member_start"][row : row + 2])
        table = (self.columns[name][start:stop].tolist() for name in MEMBER_COLUMNS)
        return [(self.extensions[code], offset, size, crc) for code, offset, size, crc in zip(*table, strict=True)]


def index_path(shard: Path) -> Path:
    """Where the index of `digits-000000.tar` lies: `digits-000000.index.safetensors` beside it."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.safetensors")


def build_index(shard: str | Path) -> Path:
    """Read a shard once from end to end and write its index beside it.

    Returns:
        Path of the index. It appears complete or not at all.

    Raises:
        ValueError: the shard is missing, damaged (truncated, a hole, a broken header), holds a key or extension
            twice, or a sample without its picture, or without a caption that others have; the shard and the key
            are named. A picture that does not decode is no error here: its size is noted as 0 and the loader
            replaces it.
    """
    shard = Path(shard)
    if not shard.is_file():
        raise ValueError(f"shard {shard} is missing; give the path of a tar file")
    index = _scan(shard)
    facts = {
        "version": VERSION,
        "shard_size": index.shard_size,
        "shard_sha256": index.shard_sha256,
        "extensions": index.extensions,
        "checksum": _checksum(index.columns),
    }
    # One entry: safetensors writes several in random order, and equal shards should have equal indexes.
    metadata = {"index": json.dumps(facts)}
    target = index_path(shard)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as stream:
            stream.write(save(dict(index.columns), metadata))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise ValueError(
            f"the index of {shard} cannot be written beside it ({error.strerror}); "
            "run `lumina data index` where the folder is writable"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def open_index(shard: Path) -> ShardIndex | None:
    """The index beside a shard, None if there is none or it does not belong to the shard as it is now.

    Not belonging: another size, an index older than the shard, another version, or a damaged index file.
    """
    path = index_path(shard)
    if not path.is_file():
        return None
    shard_stat = shard.stat()
    if path.stat().st_mtime_ns < shard_stat.st_mtime_ns:
        return None
    try:
        with safe_open(path, framework="np") as stored:
            facts = json.loads((stored.metadata() or {}).get("index", "{}"))
            columns = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError):
        return None
    if facts.get("version") != VERSION or facts.get("shard_size") != shard_stat.st_size:
        return None
    if set(columns) != set(_COLUMNS) or facts.get("checksum") != _checksum(columns):
        return None
    return ShardIndex(shard, shard_stat.st_size, facts["shard_sha256"], tuple(facts["extensions"]), columns)


def _checksum(columns: Mapping[str, np.ndarray]) -> str:
    # safetensors checks no contents, and a flipped bit in an offset would make a good shard look bad.
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name}:{columns[name].dtype}:{columns[name].shape};".encode())
        digest.update(columns[name].tobytes())
    return digest.hexdigest()


@dataclass
class _Facts:
    height: int = 0
    width: int = 0
    frames: int = 1
    caption_length: int = -1
    label: int = -1


def _scan(shard: Path) -> ShardIndex:
    walk = TarWalk(shard)
    extensions: dict[str, int] = {}
    lists: dict[str, list[int]] = {name: [] for name in (*SAMPLE_COLUMNS, *MEMBER_COLUMNS)}
    key_start, member_start, key_bytes = [0], [0], bytearray()
    seen: set[str] = set()
    uncaptioned: str | None = None
    for key, members in _grouped(walk, shard):
        if key in seen:
            raise ValueError(f"shard {shard} holds the key {key} twice, the second time at byte {members[0][1].offset}")
        seen.add(key)
        facts = _facts(shard, key, members)
        if facts.caption_length < 0:
            uncaptioned = uncaptioned or key
        for name in SAMPLE_COLUMNS:
            lists[name].append(getattr(facts, name))
        for extension, member in members:
            row = extensions.setdefault(extension, len(extensions)), member.offset, len(member.data), member.crc
            for name, value in zip(MEMBER_COLUMNS, row, strict=True):
                lists[name].append(value)
        key_bytes += key.encode("utf-8", "surrogateescape")
        key_start.append(len(key_bytes))
        member_start.append(len(lists["offset"]))
    if not seen:
        raise ValueError(f"shard {shard} holds no samples")
    captioned = max(lists["caption_length"]) >= 0
    if uncaptioned is not None and captioned:
        raise ValueError(
            f"sample {uncaptioned} of shard {shard} has a picture and no caption while others have one; "
            "was the shard cut between two members?"
        )
    columns = {name: np.array(values, dtype=_COLUMNS[name]) for name, values in lists.items()}
    columns |= {"key_start": np.array(key_start, np.int64), "member_start": np.array(member_start, np.int64)}
    columns["key_bytes"] = np.frombuffer(bytes(key_bytes), np.uint8)
    return ShardIndex(shard, walk.size, walk.sha256, tuple(extensions), columns)


def _grouped(walk: TarWalk, shard: Path):
    """(key, [(extension, member), …]) for each run of members of one key; the key ends at the first dot of the name."""
    key, members = "", []
    for member in walk:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not dot:
            raise ValueError(f"member {member.name} of shard {shard} is not named KEY.EXTENSION")
        if members and folder + slash + stem != key:
            yield key, members
            members = []
        key = folder + slash + stem
        if any(extension == other for other, _ in members):
            raise ValueError(f"sample {key} of shard {shard} has .{extension} twice, again at byte {member.offset}")
        members.append((extension, member))
    if members:
        yield key, members


def _facts(shard: Path, key: str, members: Sequence[tuple[str, Member]]) -> _Facts:
    contents = {extension: member.data for extension, member in members}
    pictures = [extension for extension in IMAGE_EXTENSIONS if extension in contents]
    if len(pictures) != 1:
        raise ValueError(
            f"sample {key} of shard {shard} has {len(pictures) or 'no'} pictures, only {sorted(contents)}; "
            f"it must have one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    facts = _Facts()
    # What cannot be read keeps its default: the sample is bad, which the loader finds, counts and mends.
    try:
        facts.height, facts.width = image_size(contents)
    except BadSampleError:
        facts.height = facts.width = 0
    try:
        fields = parse_json(contents)
    except BadSampleError:
        facts.caption_length = 0
        return facts
    try:
        caption = caption_of(contents, fields)
        facts.caption_length = -1 if caption is None else len(caption)
    except BadSampleError:
        facts.caption_length = 0
    try:
        label = label_of(fields)
        facts.label = -1 if label is None else label
    except BadSampleError:
        facts.label = -1
    if facts.caption_length < 0 and facts.label < 0 and fields.get("label") is None:
        raise ValueError(f"sample {key} of shard {shard} has a picture and neither caption nor label")
    return facts
