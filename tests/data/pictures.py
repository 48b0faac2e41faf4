"""Folders of real pictures for the recipes' tests, and what shards hold according to the standard library."""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

_DIGITS = load_digits()


def digit_png(number: int, path: Path) -> Path:
    """The digit of that number, enlarged 1 + number % 3 times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.kron(_DIGITS.images[number] * 15, np.ones((1 + number % 3,) * 2)).astype(np.uint8)
    Image.fromarray(grey).save(path)
    return path


def captioned(folder: Path, count: int, classes: int = 2) -> Path:
    """`count` digits in folders `c 0`, `c 1`, …, each with its caption."""
    for number in range(count):
        path = digit_png(number, folder / f"c {number % classes}" / f"d{number:03d}.v2.png")
        path.with_suffix(".txt").write_text(f"caption of {number}\n", encoding="utf-8")
    return folder


def members(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    """File name of each shard → (name, content) of its members in order."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found[shard.name] = [(info.name, tar.extractfile(info).read()) for info in tar]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
