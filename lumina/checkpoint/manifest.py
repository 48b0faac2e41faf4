"""What a checkpoint folder says about itself: manifest.json, beside the safetensors files it lists.

A tensor is stored flat, in pieces; a piece is a stretch of it, or of a part of it, in one of the files. Which rank
wrote which piece does not matter to a reader, so a checkpoint opens under any layout.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from pydantic import model_validator

from lumina.config.schema import Section
from lumina.parallel.fragments import Part

VERSION = 3
READABLE = (1, 2, VERSION)  # 1 knew no parts; until 3, no model, and files had hashes and pieces none
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
CONFIG = "config.yaml"
FOLDER = "checkpoints"
LATEST = "latest"

# The kinds of tensors of a training checkpoint.
WEIGHTS, EMA, MOMENTS = "master", "ema", ("exp_avg", "exp_avg_sq")


class PieceEntry(Section):
    """Elements [start, start + numel) of a tensor's flattened part (None: all of it): the tensor `key` of `file`."""

    file: str
    key: str
    start: int
    numel: int
    part: Part | None = None
    sha256: str | None = None


class TensorEntry(Section):
    """A tensor and where its pieces are."""

    shape: list[int]
    pieces: list[PieceEntry]

    @model_validator(mode="after")
    def _pieces_are_of_the_tensor(self) -> "TensorEntry":
        for piece in self.pieces:
            plain_stretch(self.shape, piece.part, piece.start, piece.numel)
        return self


class FileEntry(Section):
    """What a file must be. Where its pieces have hashes of their own, `sha256` is of its header alone."""

    bytes: int
    sha256: str


class Manifest(Section):
    """The whole of manifest.json; `tensors` is by kind, then by public parameter name."""

    format: str
    version: int
    step: int
    optimizer_steps: int
    data: dict[str, Any]
    tensors: dict[str, dict[str, TensorEntry]]
    files: dict[str, FileEntry]
    software: dict[str, str]
    model: dict[str, Any] | None = None
    """Fields of FlagDiTConfig."""


def plain_stretch(
    shape: Sequence[int], part: Part | None, start: int, numel: int | None
) -> tuple[Part | None, int, int]:
    """Elements [start, start + numel) of the flattened part (to its end by default), as part, start and numel.

    A part that is one stretch of the flattened tensor, as every part along dim 0 is, becomes that: its part is None.

    Raises:
        ValueError: where the tensor has no such part, or the part no such elements.
    """
    if part is None:
        shape, part = (prod(shape),), Part(0, 0, prod(shape))
    dim, first, last = part
    if not (0 <= dim < len(shape) and 0 <= first <= last <= shape[dim]):
        raise ValueError(f"a tensor of shape {tuple(shape)} has no {part}")
    outer, inner = prod(shape[:dim]), prod(shape[dim + 1 :])
    total = outer * (last - first) * inner
    numel = total - start if numel is None else numel
    if not 0 <= start <= start + numel <= total:
        raise ValueError(f"{part} of shape {tuple(shape)} has {total} elements, not {start} to {start + numel}")
    if outer == 1 or last - first == shape[dim]:
        return None, first * inner + start, numel
    return part, start, numel


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        ValueError: where there is none, it is damaged, or not one that this version reads.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}; it is no checkpoint, or a save that never finished")
    text = path.read_bytes()
    try:
        tree = json.loads(text)
        known = isinstance(tree, dict) and tree.get("version") in READABLE
        hashed = (directory / MANIFEST_HASH).exists() or (known and tree["version"] >= 3)
        if hashed and (directory / MANIFEST_HASH).read_text() != _hash_line(text):
            raise ValueError(f"its SHA-256 is not the one in {MANIFEST_HASH}")
        manifest = Manifest.model_validate(tree) if known else None
    except (ValueError, OSError) as error:  # broken JSON, broken UTF-8 and pydantic's errors alike
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged, or not written by Lumina ({reason})") from error
    if manifest is None or manifest.format != "lumina-checkpoint":
        raise ValueError(
            f"{path}: not a Lumina checkpoint of version {', '.join(map(str, READABLE))}; it may be damaged, or "
            "written by a newer version"
        )
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Durably, with a hash that `sha256sum -c` checks too.

    Raises:
        OSError: where the disk does not take it.
    """
    text = json.dumps(manifest.model_dump(), separators=(",", ":")).encode()
    write_durably(directory / MANIFEST, text)
    write_durably(directory / MANIFEST_HASH, _hash_line(text).encode())


def _hash_line(text: bytes) -> str:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / FOLDER / f"step_{step:08d}"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a save that never finished is none."""
    folders = (run_dir / FOLDER).glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d{8}", folder.name) and folder.is_dir())


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint to what `checkpoints_of` does not take for one, its files as they are; where it is then.

    Raises:
        OSError: where it cannot be renamed.
    """
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    return folder.rename(aside)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk; its folder is the caller's to flush."""
    path.write_bytes(data)
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: a reader, or a kill, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    write_durably(temporary, text.encode())
    temporary.rename(path)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
