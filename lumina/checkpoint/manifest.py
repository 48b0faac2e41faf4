"""What a checkpoint folder says about itself: manifest.json, beside the safetensors files it lists.

A tensor is stored flat, in pieces; a piece is a stretch of it, or of a part of it, in one of the files. Which rank
wrote which piece does not matter to a reader, so a checkpoint opens under any layout.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from pydantic import model_validator

from lumina.config.schema import Section
from lumina.parallel.fragments import Part

VERSION = 3
READABLE = (1, 2, VERSION)  # version 1 knew no parts, version 2 no model
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FOLDER = "checkpoints"

# The kinds of tensors of a training checkpoint.
WEIGHTS, EMA, MOMENTS = "master", "ema", ("exp_avg", "exp_avg_sq")


class PieceEntry(Section):
    """Elements [start, start + numel) of a tensor's flattened part (None: all of it): the tensor `key` of `file`."""

    file: str
    key: str
    start: int
    numel: int
    part: Part | None = None


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
    """What a file must be."""

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
    model: dict[str, Any] | None = None  # the fields of FlagDiTConfig


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
        ValueError: where there is none, or it is not one that this version reads.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}; it is no checkpoint, or a save that never finished")
    try:
        tree = json.loads(path.read_text())
        manifest = Manifest.model_validate(tree)
    except ValueError as error:  # broken JSON and pydantic's errors alike
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged, or not written by Lumina ({reason})") from error
    if manifest.format != "lumina-checkpoint" or manifest.version not in READABLE:
        raise ValueError(f"{path}: format {manifest.format} {manifest.version}; this version reads {READABLE}")
    return manifest


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / FOLDER / f"step_{step:08d}"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run_dir / FOLDER).glob("step_*")
    return sorted(f for f in folders if re.fullmatch(r"step_\d{8}", f.name) and (f / MANIFEST).is_file())


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
