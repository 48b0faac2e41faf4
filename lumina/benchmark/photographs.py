"""Pictures to measure loaders with: scikit-image's photographs, re-encoded as JPEGs of about one megapixel."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from lumina.data.write import write_shards

SIZES = ((1024, 1024), (832, 1248), (1248, 832), (880, 1184), (1184, 880), (768, 1360))
"""(height, width) in pixels: square, 3:2, 4:3 and 16:9, lying and standing."""
SHARDS = 16
QUALITY = 90
_CELL = (300, 400)  # no photograph is smaller
_VERSION = 1


@dataclass(frozen=True)
class Photographs:
    """The same pictures twice, each with a caption.

    shards: folder of webdataset shards, with indexes.
    files: folder of .jpg and .txt files.
    """

    shards: Path
    files: Path
    count: int
    bytes: int  # of the JPEGs


def photographs(folder: Path, count: int, progress: Callable[[int, int], object] | None = None) -> Photographs:
    """`count` JPEGs below `folder`, made unless they are there.

    Each is a mosaic of crops of the photographs, at their own scale and some mirrored: enlarged ones would hold less
    detail a pixel than a camera gives, and decode faster.

    Raises:
        ValueError: fewer than `SHARDS`, a folder that cannot be written or holds something else, or scikit-image is
            not installed.
    """
    if count < SHARDS:
        raise ValueError(f"--images {count}: at least {SHARDS} are needed, one a shard")
    target = folder / f"photographs-{count}"
    description = target / "description.json"
    if target.exists() and not _is_ours(description, count):
        raise ValueError(f"{target} is there and was not made by this version; remove it, or name another --dir")
    if not target.exists():
        _sources()  # before anything is written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder))
        except OSError as error:
            raise ValueError(f"--dir {folder} cannot be written to ({error.strerror})") from error
        try:
            total = _make(work, count, progress)
            (work / description.name).write_text(json.dumps({"version": _VERSION, "count": count, "bytes": total}))
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    facts = json.loads(description.read_text())
    return Photographs(target / "shards", target / "files", count, facts["bytes"])


def _is_ours(description: Path, count: int) -> bool:
    try:
        facts = json.loads(description.read_text())
        return facts["version"] == _VERSION and facts["count"] == count and facts["bytes"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(work: Path, count: int, progress: Callable[[int, int], object] | None) -> int:
    files = work / "files"
    files.mkdir()
    total = 0
    # Threads: nearly all the time goes into the encoder, outside the interpreter's lock.
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        for number, data in enumerate(pool.map(photograph, range(count))):
            (files / f"{number:06d}.jpg").write_bytes(data)
            (files / f"{number:06d}.txt").write_text(caption(number))
            total += len(data)
            if progress is not None:
                progress(number + 1, count)

    def samples() -> Iterator[dict[str, str | bytes]]:
        for number in range(count):
            jpg = (files / f"{number:06d}.jpg").read_bytes()
            yield {"__key__": f"{number:06d}", "jpg": jpg, "txt": caption(number)}

    write_shards(work / "shards", samples(), name="photographs", samples_per_shard=-(-count // SHARDS))
    return total


def caption(number: int) -> str:
    """Of a picture."""
    return f"picture {number}, pieces of photographs side by side"


def photograph(number: int) -> bytes:
    """The JPEG of a picture."""
    draws = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    rows = np.linspace(0, height, -(-height // _CELL[0]) + 1).astype(int)
    columns = np.linspace(0, width, -(-width // _CELL[1]) + 1).astype(int)
    picture = np.empty((height, width, 3), np.uint8)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            source = _sources()[draws.integers(len(_sources()))]
            down = draws.integers(source.shape[0] - (bottom - top) + 1)
            across = draws.integers(source.shape[1] - (right - left) + 1)
            piece = source[down : down + bottom - top, across : across + right - left]
            picture[top:bottom, left:right] = piece[:, ::-1] if draws.random() < 0.5 else piece
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


_loaded: list[np.ndarray] = []


def _sources() -> list[np.ndarray]:
    """The colour photographs that scikit-image brings along, uint8 (height, width, 3)."""
    if not _loaded:
        try:
            from skimage import data
        except ImportError as error:
            raise ValueError(
                "the pictures are made of scikit-image's; install it with `pip install 'lumina-t2x[test]'`"
            ) from error
        _loaded.extend([data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.hubble_deep_field()])
        _loaded.extend([data.retina(), data.immunohistochemistry(), *data.stereo_motorcycle()[:2]])
    return _loaded
