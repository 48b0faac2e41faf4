"""Writing shards: webdataset tars with their indexes, complete or not at all."""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from lumina.data.index import build_index


def write_shards(
    out_dir: str | Path, samples: Iterable[Mapping[str, Any]], *, name: str, samples_per_shard: int
) -> list[Path]:
    """Write samples into `out_dir/NAME-000000.tar`, … with the index of each beside it.

    The folder appears when all is written, and not at all after a failure. Equal samples give equal bytes.

    Args:
        out_dir: folder, new or empty.
        samples: each {"__key__": key, extension: content}; content is bytes, text (written as UTF-8) or, for JSON
            members, a dict. A key may hold folders and has no dot in its last part.
        name: first part of the file names.
        samples_per_shard: samples of each shard but the last.

    Returns:
        The shards, in order.

    Raises:
        ValueError: the folder is not empty or cannot be written, there are no samples, or a sample has a bad key or
            content, a key that its shard holds already, or no picture.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"{name!r} cannot start a file name; use letters, digits, '.', '_' and '-'")
    out_dir = Path(out_dir).resolve()
    try:
        if out_dir.exists() and any(out_dir.iterdir()):
            raise ValueError(f"folder {out_dir} is not empty; shards are written into a new or empty folder")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is one rename on one file system.
        work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.writing-", dir=out_dir.parent))
    except OSError as error:
        raise ValueError(f"shards cannot be written to {out_dir} ({error.strerror})") from error
    try:
        work.chmod(0o777 & ~_umask())
        shards = _write_all(work, iter(samples), name, samples_per_shard)
        if not shards:
            raise ValueError(f"there are no samples to write to {out_dir}")
        _sync(work)
        work.rename(out_dir)
        _sync(out_dir.parent)
    except OSError as error:
        raise ValueError(f"shards cannot be written to {out_dir} ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [out_dir / shard for shard in shards]


def _write_all(folder: Path, samples: Any, name: str, samples_per_shard: int) -> list[str]:
    shards = []
    for first in samples:
        shard = folder / f"{name}-{len(shards):06d}.tar"
        with shard.open("wb") as stream:
            # Fixed time and owner: the same samples give the same shard, so the same identity of the data set.
            with TarWriter(stream, encoder=False, mtime=0) as writer:
                for sample in itertools.chain([first], itertools.islice(samples, samples_per_shard - 1)):
                    writer.write(_encoded(sample))
            stream.flush()
            os.fsync(stream.fileno())
        build_index(shard)
        shards.append(shard.name)
    return shards


def _encoded(sample: Mapping[str, Any]) -> dict[str, Any]:
    key = sample.get("__key__")
    if not isinstance(key, str) or not re.fullmatch(r"(?:[^/\0]+/)*[^/.\0]+", key):
        raise ValueError(f'"__key__" of a sample must be text without a dot in its last part, not {key!r}')
    encoded: dict[str, Any] = {"__key__": key}
    for extension, content in sample.items():
        if extension == "__key__":
            continue
        if extension != extension.lower() or not re.fullmatch(r"[^_./][^/]*", extension):
            raise ValueError(f"sample {key} has the extension {extension!r}; use lower case, such as 'png' or 'txt'")
        if isinstance(content, dict):
            content = json.dumps(content, sort_keys=True, ensure_ascii=False)
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes):
            raise ValueError(
                f".{extension} of sample {key} must be bytes, text or a dict, not {type(content).__name__}"
            )
        encoded[extension] = content
    return encoded


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
