"""Loading: any stretch of any part of a tensor, whoever wrote it; files are checked before they are used."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.checkpoint.manifest import (
    CONFIG,
    PieceEntry,
    TensorEntry,
    checkpoints_of,
    plain_stretch,
    read_manifest,
    sha256_of,
)
from lumina.checkpoint.tensor_file import StoredTensors
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.model.config import FlagDiTConfig
from lumina.parallel.fragments import Part
from lumina.parallel.mesh import Mesh

_OPEN_FILES = 64


class Checkpoint:
    """An open checkpoint folder. What is read of it is checked first, by SHA-256, and nothing else is."""

    def __init__(self, directory: Path):
        """
        Raises:
            ValueError: where `directory` holds no complete checkpoint.
        """
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._checked: set[str] = set()  # files
        self._files: dict[str, StoredTensors] = {}
        self._opening = Lock()

    @property
    def config(self) -> Config:
        """The configuration of the run that wrote it.

        Raises:
            ValueError: where there is none, as in what was converted without one.
        """
        if CONFIG not in self.manifest.files:
            raise ValueError(
                f"{self.directory} has no {CONFIG}: it was converted without one; repeat `lumina convert` with "
                "--config CONFIG, the configuration of the run that is to go on from it"
            )
        return load_config(self._check(CONFIG))

    def text(self, name: str) -> str:
        """A file that stands beside the tensors.

        Raises:
            ValueError: where it is not there, or damaged.
        """
        return self._check(name).read_text()

    @property
    def model(self) -> FlagDiTConfig:
        """The sizes of the model whose tensors these are."""
        sizes = self.manifest.model
        return model_config(self.config) if sizes is None else FlagDiTConfig.from_dict(sizes)

    def names(self, kind: str) -> list[str]:
        """Tensors of a kind; none for a kind that was not saved."""
        return list(self.manifest.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self._entry(kind, name).shape)

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None, part: Part | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened part (None: the tensor), fp32; to its end by default.

        Raises:
            ValueError: for a tensor or stretch that the checkpoint lacks, or a file that is damaged, naming it.
        """
        entry = self._entry(kind, name)
        try:
            part, start, numel = plain_stretch(entry.shape, part, start, numel)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {kind}/{name}: {error}") from None
        if part is not None and any(piece.part is not None and piece.part.dim != part.dim for piece in entry.pieces):
            whole = self.read(kind, name).view(entry.shape)  # cut across another dimension: no common rows
            return whole.narrow(part.dim, part.start, part.stop - part.start).reshape(-1)[start : start + numel]
        for piece in entry.pieces:
            if (piece.part, piece.start, piece.numel) == (part, start, numel):  # as at the layout that saved it
                return self._stored(piece)
        values, found = torch.empty(numel), torch.zeros(numel, dtype=torch.bool)
        for piece in entry.pieces:
            dim = next((p.dim for p in (piece.part, part) if p is not None), 0)
            asked = _blocks(entry.shape, dim, part, start, numel)
            held = _blocks(entry.shape, dim, piece.part, piece.start, piece.numel)
            common = [(ours, theirs, both) for ours in asked for theirs in held if (both := ours.common(theirs))]
            if common:
                stored = self._stored(piece)
                for ours, theirs, both in common:
                    ours.cut(values, both).copy_(theirs.cut(stored, both))
                    ours.cut(found, both).fill_(True)
        # Elements, not pieces, are counted: one that two pieces hold does not make up for one that none holds.
        covered = int(found.count_nonzero())
        if covered != numel:
            of_part = f" of its {part}" if part is not None else ""
            raise ValueError(
                f"{self.directory}: {kind}/{name} has {covered} of the elements {start} to {start + numel}{of_part}; "
                "pieces are missing"
            )
        return values

    def state_dict(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind, whole."""
        return {name: self.read(kind, name).view(self.shape(kind, name)) for name in self.names(kind)}

    def _entry(self, kind: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[kind][name]
        except KeyError:
            raise ValueError(f"{self.directory} has no tensor {kind}/{name}") from None

    def damage(self, rank: int = 0, world: int = 1) -> str:
        """What is wrong with this rank's share of the folder, files and pieces; empty where nothing is.

        Everything is read once, by one of the `world` ranks: at the layout that saved it, by the one that wrote it,
        whose host then has it in memory.
        """
        pieces = [piece for of_kind in self.manifest.tensors.values() for t in of_kind.values() for piece in t.pieces]
        pieces.sort(key=lambda piece: (piece.file, piece.key))
        ends = list(accumulate(piece.numel for piece in pieces))
        share = [p for p, end in zip(pieces, ends, strict=True) if (end - 1) * world // max(1, ends[-1]) == rank]
        try:
            for name in list(self.manifest.files)[rank::world]:
                self._check(name)
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
                for _ in pool.map(self._verify, share):
                    pass
        except ValueError as error:
            return str(error)
        return ""

    def _stored(self, piece: PieceEntry) -> Tensor:
        """The piece's values in fp32, which are what was saved."""
        file = self._open(piece.file)
        if piece.key not in file:
            raise self._not_what_was_saved(piece)
        values, sha256 = file.read(piece.key)
        if values.numel() != piece.numel or piece.sha256 not in (None, sha256):
            raise self._not_what_was_saved(piece)
        return values

    def _verify(self, piece: PieceEntry) -> None:
        file = self._open(piece.file)
        if piece.key not in file or piece.sha256 not in (None, file.sha256(piece.key)):
            raise self._not_what_was_saved(piece)

    def _not_what_was_saved(self, piece: PieceEntry) -> ValueError:
        return self._damaged(piece.file, f"its tensor {piece.key} is not what was saved (SHA-256)")

    def _open(self, name: str) -> StoredTensors:
        with self._opening:
            self._check(name)
            if name not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    del self._files[next(iter(self._files))]
                self._files[name] = StoredTensors(self.directory / name)
            return self._files[name]

    def _check(self, name: str) -> Path:
        """The path of a file of the size that was saved, and with its hash, which may be of the header alone."""
        path = self.directory / name
        if name not in self._checked:
            listed = self.manifest.files.get(name)
            if listed is None or Path(name).name != name:
                raise ValueError(f"{self.directory}: the manifest names {name!r}, which it does not list as a file")
            if not path.is_file() or path.stat().st_size != listed.bytes:
                raise self._damaged(name, f"it is no file of {listed.bytes:,} bytes")
            pieces_have_hashes = self.manifest.version >= 3 and name.endswith(".safetensors")
            found = hashlib.sha256(StoredTensors(path).header).hexdigest() if pieces_have_hashes else sha256_of(path)
            if found != listed.sha256:
                what = "its header is" if pieces_have_hashes else "it is"
                raise self._damaged(name, f"{what} not what was saved (SHA-256)")
            self._checked.add(name)
        return path

    def _damaged(self, name: str, what: str) -> ValueError:
        if not self.directory.exists():
            return ValueError(
                f"{self.directory} is gone since it was opened: a run that trains keeps as many as its checkpoint.keep "
                "says; take the newest, or let it keep more"
            )
        return ValueError(f"{self.directory / name} is missing or damaged: {what}; take another checkpoint")


class _Block(NamedTuple):
    """Rows [top, bottom) × columns [left, right) of a grid, row by row from element `offset` of a flat tensor on."""

    offset: int
    top: int
    bottom: int
    left: int
    right: int

    def common(self, other: "_Block") -> "_Block | None":
        """What both hold, or None; its offset means nothing."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return _Block(0, top, bottom, left, right) if top < bottom and left < right else None

    def cut(self, flat: Any, inner: "_Block") -> Tensor:
        """The block `inner` within this one, as a matrix: a view of a tensor, or what is read of a file's slice."""
        rows, columns, stride = inner.bottom - inner.top, inner.right - inner.left, self.right - self.left
        first = self.offset + (inner.top - self.top) * stride + inner.left - self.left
        return flat[first : first + (rows - 1) * stride + columns].as_strided((rows, columns), (stride, 1))


def _blocks(shape: Sequence[int], dim: int, part: Part | None, start: int, numel: int) -> list[_Block]:
    """Where elements [start, start + numel) of the flattened part, along `dim` or None, are in a grid of the tensor.

    A row of the grid is what one index of the dimensions before `dim` selects; a part along `dim` is some of its
    columns. A stretch begins and ends anywhere in a row: at most three blocks.
    """
    left, right = 0, prod(shape[dim:])
    if part is not None:
        left, right = (index * prod(shape[dim + 1 :]) for index in part[1:])
    blocks, done = [], 0
    while done < numel:
        row, column = divmod(start + done, right - left)
        columns = min(right - left - column, numel - done)
        rows = max(1, (numel - done) // columns) if column == 0 else 1
        blocks.append(_Block(done, row, row + rows, left + column, left + column + columns))
        done += rows * columns
    return blocks


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None.

    Raises:
        ValueError: where its manifest is damaged.
    """
    folders = checkpoints_of(run_dir)
    return Checkpoint(folders[-1]) if folders else None


def newest_whole_checkpoint(run_dir: Path, mesh: Mesh) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint of a run in which nothing is damaged, or None where there is none at all.

    Each rank checks a share of what is there; all take the same.

    Returns:
        The checkpoint, and what is wrong with newer ones, by folder; the latter on the first rank.

    Raises:
        ValueError: where all are damaged.
    """
    folders, problems = mesh.from_first(checkpoints_of(run_dir)[::-1]), {}
    for folder in folders:
        checkpoint, problem = None, ""
        try:
            checkpoint = Checkpoint(folder)
            problem = checkpoint.damage(mesh.world.rank, mesh.world.size)
        except (ValueError, OSError) as error:  # a disk that fails to read it has lost it
            problem = str(error)
        found = [one for one in mesh.gather(problem) or [] if one]
        if not mesh.any(bool(problem)):
            return checkpoint, problems
        if found:
            problems[folder] = found[0]
    if folders:
        raise ValueError(
            f"every checkpoint of {run_dir} is damaged, and training does not start anew over them: "
            f"{'; '.join(problems.values()) or 'the first process says why'}; name another run.dir, or move them away"
        )
    return None, {}


def model_config(config: Config) -> FlagDiTConfig:
    """The model's sizes in a run's configuration.

    Raises:
        ValueError: for sizes that do not fit together, and where `text` is given to a label-conditional model or
            missing for a text-conditional one.
    """
    sizes = FlagDiTConfig.from_dict(config.model)
    if sizes.text_conditional and config.text is None:
        raise ValueError("text is missing: a text-conditional model needs an encoder, as `text: {encoder: bytes}`")
    if not sizes.text_conditional and config.text is not None:
        raise ValueError("text is given, but model.num_classes makes the model label-conditional; remove one of them")
    return sizes
