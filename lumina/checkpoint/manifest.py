"""What a checkpoint folder says about itself: manifest.json, beside the safetensors files it lists.

A tensor is stored flat, in pieces; a piece is a stretch of it in one of the files. Which rank wrote which piece does
not matter to a reader, so a checkpoint opens under any layout.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lumina.config.schema import Section

VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FOLDER = "checkpoints"

# The kinds of tensors of a training checkpoint.
WEIGHTS, EMA, MOMENTS = "master", "ema", ("exp_avg", "exp_avg_sq")


class PieceEntry(Section):
    """Elements [start, start + numel) of a flattened tensor: the tensor `key` of `file`."""

    file: str
    key: str
    start: int
    numel: int


class TensorEntry(Section):
    """A tensor and where its pieces are."""

    shape: list[int]
    pieces: list[PieceEntry]


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
    if manifest.format != "lumina-checkpoint" or manifest.version != VERSION:
        raise ValueError(f"{path}: format {manifest.format} {manifest.version}; this version reads {VERSION}")
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
