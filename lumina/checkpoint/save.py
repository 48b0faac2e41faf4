"""Saving: each rank its own pieces, durable before visible."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lumina.checkpoint.manifest import CONFIG, MANIFEST, VERSION, checkpoints_of, plain_stretch, sha256_of, step_folder
from lumina.config.load import dump_config
from lumina.config.schema import Config
from lumina.model.config import FlagDiTConfig
from lumina.parallel.fragments import Part
from lumina.parallel.mesh import Mesh

_PACKAGES = ("lumina-t2x", "torch", "deepspeed", "safetensors", "numpy")


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a tensor that this rank writes: flat `values`, from element `start` of the flattened part on."""

    kind: str
    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor
    part: Part | None = None  # the whole tensor


def save_checkpoint(
    run_dir: Path,
    step: int,
    pieces: Iterable[Piece],
    *,
    config: Config,
    optimizer_steps: int,
    data: dict[str, Any],
    mesh: Mesh,
) -> Path:
    """Write the checkpoint of `step` and return its folder. Called by every rank with the pieces it owns.

    Everything is written into a temporary folder and flushed to disk; only then is the folder renamed, so that a
    folder under its final name is always whole. Older checkpoints than the newest `checkpoint.keep` are removed.

    Raises:
        OSError: on every rank, where any could not write; nothing is then left under the final name.
    """
    final = step_folder(run_dir, step)
    temporary = final.with_name(f".{final.name}.partial")
    if mesh.is_first:
        for leftover in final.parent.glob(".step_*.partial") if final.parent.is_dir() else ():
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    mesh.barrier()

    problem, report = "", None
    try:
        report = _write_pieces(temporary / f"rank_{mesh.world.rank:05d}.safetensors", pieces)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    reports = mesh.gather((problem, report))
    if mesh.is_first:
        problem = next((theirs for theirs, _ in reports if theirs), "")
        if not problem:
            try:
                _write_durably(temporary / CONFIG, dump_config(config))
                written = [theirs for _, theirs in reports if theirs] + [_report(temporary / CONFIG)]
                manifest = _manifest(step, optimizer_steps, data, written)
                manifest["model"] = FlagDiTConfig.from_dict(config.model).to_dict()
                _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
                _sync(temporary)
                if final.exists():  # a run that resumed from before this step comes by again
                    shutil.rmtree(final)
                temporary.rename(final)
                _sync(final.parent)
                for old in checkpoints_of(run_dir)[: -config.checkpoint.keep]:
                    shutil.rmtree(old)
            except OSError as error:
                problem = str(error)
    if mesh.any(bool(problem)):
        if mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} could not be saved under {final}: {problem or 'see rank 0'}")
    return final


def _write_pieces(path: Path, pieces: Iterable[Piece]) -> dict[str, Any] | None:
    tensors: dict[str, Tensor] = {}
    entries = []
    for piece in pieces:
        key = f"{piece.kind}/{piece.name}"
        assert key not in tensors, f"{key} twice from one rank"  # the second would replace the first
        tensors[key] = piece.values.detach().to("cpu", torch.float32).contiguous()
        part, start, numel = plain_stretch(piece.shape, piece.part, piece.start, piece.values.numel())
        entries.append((piece.kind, piece.name, list(piece.shape), start, numel, part))
    if not tensors:
        return None
    # safetensors refuses tensors that share memory, as two fragments of one flat partition would.
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    _sync(path)
    return _report(path, entries)


def _report(path: Path, entries: Sequence[tuple] = ()) -> dict[str, Any]:
    """What the manifest says of a file; `entries`: kind, name, shape, start, numel and part of each piece in it."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "entries": entries}


def _manifest(step: int, optimizer_steps: int, data: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for report in reports:
        for kind, name, shape, start, numel, part in report["entries"]:
            tensor = tensors.setdefault(kind, {}).setdefault(name, {"shape": shape, "pieces": []})
            piece = {"file": report["file"], "key": f"{kind}/{name}", "start": start, "numel": numel, "part": part}
            tensor["pieces"].append(piece)
    return {
        "format": "lumina-checkpoint",
        "version": VERSION,
        "step": step,
        "optimizer_steps": optimizer_steps,
        "data": data,
        "tensors": tensors,
        "files": {r["file"]: {"bytes": r["bytes"], "sha256": r["sha256"]} for r in reports},
        "software": {package: version(package) for package in _PACKAGES},
    }


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: a reader, or a kill, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    _write_durably(temporary, text)
    temporary.rename(path)


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
