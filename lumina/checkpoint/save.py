"""Saving: each rank its own pieces, durable before visible, beside the training if asked."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.checkpoint.manifest import (
    CONFIG,
    FOLDER,
    LATEST,
    VERSION,
    FileEntry,
    Manifest,
    checkpoints_of,
    plain_stretch,
    replace_text,
    sha256_of,
    step_folder,
    sync,
    write_durably,
    write_manifest,
)
from lumina.checkpoint.tensor_file import TensorFile
from lumina.config.load import dump_config
from lumina.config.schema import Config
from lumina.parallel.fragments import Part
from lumina.parallel.mesh import Mesh

FAILURES_LIMIT = 3
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


@dataclass(frozen=True)
class SaveState:
    """What a checkpoint says beside its tensors."""

    step: int
    optimizer_steps: int
    data: dict[str, Any]
    model: dict[str, Any]
    """Fields of FlagDiTConfig."""
    texts: dict[str, str] = field(default_factory=dict)
    """Files beside the tensors, by name; of the first rank."""


class _Written(NamedTuple):
    """What a rank tells of its file: what went wrong, or how the manifest lists it."""

    problem: str
    file: str = ""
    entry: FileEntry | None = None
    tensors: Sequence[tuple] = ()  # kind, name, shape and piece of each


class Saver:
    """The saves of a run, at most one in flight. Every rank makes one, and calls the same methods at the same steps.

    Each rank writes its pieces into a temporary folder and flushes them to the disk; when all have, the first rank
    adds the manifest, and only then is the folder renamed, so that one under its final name is always whole.

    An asynchronous save copies while the next forward and backward pass runs: `before_update` must be called before
    anything that was given to `start` changes.

    A save that fails is said and counted, and training goes on; three in a row, or one that is waited for to the
    end by `finish`, raise OSError on every rank. What was saved before stays as it was.
    """

    def __init__(self, run_dir: Path, config: Config, mesh: Mesh):
        self._run_dir, self._config, self._mesh = run_dir, config, mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._state: SaveState | None = None  # of the save in flight
        self._writing: Future[_Written] | None = None
        self._removing: Future[None] | None = None
        self._copies: list[Tensor] = []
        self._copied = Event()
        self._copied.set()
        self._held_up = 0.0
        self._failures, self._failure = 0, ""

    @property
    def ready(self) -> bool:
        """Whether this rank has nothing in flight that it still writes."""
        return self._writing is None or self._writing.done()

    def start(self, state: SaveState, pieces: Iterable[Piece]) -> str:
        """Save the pieces as they are now, or, asynchronous, begin to.

        Returns:
            What went wrong, in this save or the one before it; empty where nothing did.
        """
        with self._counted():
            return self._start(state, pieces)

    def _start(self, state: SaveState, pieces: Iterable[Piece]) -> str:
        problem, asynchronous = self._settle(), self._config.checkpoint.asynchronous
        self._state = state
        temporary = self._temporary()
        unmade = ""
        if self._mesh.is_first:
            try:
                if self._removing is not None:
                    self._removing.result()
                _sweep(list(temporary.parent.glob(".step_*")))
                temporary.mkdir(parents=True)
            except OSError as error:
                unmade = str(error)
        self._mesh.barrier()
        if unmade:
            self._writing = Future()
            self._writing.set_result(_Written(unmade))
        else:
            path, mine = temporary / f"rank_{self._mesh.world.rank:05d}.safetensors", list(pieces)
            if asynchronous:
                self._copied.clear()
                on_device = any(piece.values.is_cuda for piece in mine)
                now = torch.cuda.current_stream().record_event() if on_device else None
                self._writing = self._thread.submit(self._copy_and_write, path, mine, now)
            else:
                self._writing = self._thread.submit(_write, path, mine, self._mesh.activity.wrote)
        return problem if asynchronous else problem or self._settle()

    def advance(self, all_ready: bool) -> str:
        """Once a step, with whether every rank is `ready`: make a save visible that all have written.

        Returns:
            What went wrong; empty where nothing did.
        """
        with self._counted():
            return self._settle() if all_ready else ""

    def before_update(self) -> None:
        """Wait until what is being saved has been copied: it may change after that."""
        with self._counted():
            self._copied.wait()

    def take_seconds(self) -> float:
        """For how long saving has held up the caller since this was last asked."""
        seconds, self._held_up = self._held_up, 0.0
        return seconds

    def wait(self) -> str:
        """Wait for what is in flight. Returns what went wrong; empty where nothing did."""
        with self._counted():
            return self._settle()

    def finish(self) -> str:
        """Wait for what is in flight. Returns what went wrong beside it; empty where nothing did.

        Raises:
            OSError: where the last save failed.
        """
        problem = self._settle()
        if self._removing is not None:
            self._removing.result()
        if self._failure:
            raise OSError(self._failure)
        return problem

    def close(self) -> None:
        """Let go of the thread; a save that is in flight stays unfinished, and is swept away by the next."""
        self._thread.shutdown(wait=True)

    def _temporary(self) -> Path:
        final = step_folder(self._run_dir, self._state.step)
        return final.with_name(f".{final.name}.partial")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._held_up += time.perf_counter() - started

    def _copy_and_write(self, path: Path, pieces: Sequence[Piece], now: torch.cuda.Event | None) -> _Written:
        """On the thread. The copies are in memory that is taken once and used by every save.

        `now`: on a GPU, when the pieces were as they are to be saved.
        """
        try:
            if now is None:
                copies = list(self._copies_of(pieces))
            else:
                stream = torch.cuda.Stream()
                stream.wait_event(now)
                with torch.cuda.stream(stream):
                    copies = list(self._copies_of(pieces))
                stream.synchronize()
        finally:
            self._copied.set()
        return _write(path, copies, self._mesh.activity.wrote)

    def _copies_of(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        for number, piece in enumerate(pieces):
            values = piece.values.detach().view(-1)
            if number == len(self._copies):
                self._copies.append(torch.empty(values.numel(), dtype=values.dtype, pin_memory=values.is_cuda))
            self._copies[number].copy_(values, non_blocking=True)
            yield replace(piece, values=self._copies[number])

    def _settle(self) -> str:
        """Wait for the save in flight, if there is one, and make it visible."""
        if self._writing is None:
            return ""
        state, written = self._state, self._writing.result()
        reports = self._mesh.gather(written)
        problem = untidy = ""
        if self._mesh.is_first:
            problem = next((f"rank {rank}: {r.problem}" for rank, r in enumerate(reports) if r.problem), "")
            if not problem:
                try:
                    self._commit(state, reports)
                    untidy = self._tidy(step_folder(self._run_dir, state.step))
                except OSError as error:
                    problem = str(error)
            if problem:
                shutil.rmtree(self._temporary(), ignore_errors=True)
        self._writing = self._state = None
        if not self._mesh.any(bool(problem)):
            self._failures, self._failure = 0, ""
            return untidy
        self._failures += 1
        self._failure = (
            f"the checkpoint of step {state.step} could not be saved in {self._run_dir / FOLDER}: "
            f"{problem or 'rank 0 says why'}; what was saved before is as it was"
        )
        if self._failures >= FAILURES_LIMIT:
            raise OSError(f"{self._failures} saves in a row failed: {self._failure}")
        return self._failure

    def _commit(self, state: SaveState, reports: Sequence[_Written]) -> None:
        temporary, final = self._temporary(), step_folder(self._run_dir, state.step)
        files = {}
        for name, text in {CONFIG: dump_config(self._config), **state.texts}.items():
            write_durably(temporary / name, text.encode())
            files[name] = FileEntry(bytes=(temporary / name).stat().st_size, sha256=sha256_of(temporary / name))
        files |= {report.file: report.entry for report in reports if report.entry}
        write_manifest(temporary, manifest_of(state, files, [entry for report in reports for entry in report.tensors]))
        sync(temporary)
        if final.exists():  # a run that resumed from before this step comes by again
            _hide(final)
        temporary.rename(final)
        sync(final.parent)

    def _tidy(self, newest: Path) -> str:
        """Point to the newest and remove the oldest. What cannot be done is told: no reason to call it unsaved."""
        problems = []
        try:
            replace_text(newest.parent / LATEST, newest.name + "\n")
        except OSError as error:
            problems.append(f"{LATEST} cannot be written ({error.strerror or error})")
        keep = self._config.checkpoint
        for old in checkpoints_of(self._run_dir)[: -keep.keep]:
            if not keep.keep_every or int(old.name.removeprefix("step_")) % keep.keep_every:
                try:
                    _hide(old)
                except OSError as error:
                    problems.append(f"{old.name} cannot be removed ({error.strerror or error})")
        self._removing = self._thread.submit(_sweep, list(newest.parent.glob(".step_*.removed")))
        return f"{newest} is saved, but {', '.join(problems)}" if problems else ""


def _hide(folder: Path) -> None:
    """Rename at once what takes long to remove: nothing half removed stands under a checkpoint's name."""
    hidden = folder.with_name(f".{folder.name}.removed")
    _sweep([hidden])  # one that could not be removed
    folder.rename(hidden)


def _sweep(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_symlink():  # to where there is more room: what is there is not ours to remove
            folder.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what stays is tried again at the next save


def _write(path: Path, pieces: Sequence[Piece], wrote: Callable[[], None]) -> _Written:
    if not pieces:
        return _Written("")
    keys = [f"{piece.kind}/{piece.name}" for piece in pieces]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    assert not twice, f"{twice[0]} twice from one rank"  # the second would replace the first
    tensors = {key: (p.values.dtype, (p.values.numel(),)) for key, p in zip(keys, pieces, strict=True)}
    try:
        with TensorFile(path, tensors, hash_tensors=True) as file:
            for key, piece in zip(keys, pieces, strict=True):
                file.write(key, piece.values)
                wrote()
            entry = file.close()
    except OSError as error:
        return _Written(f"{path.name}: {error.strerror or error}")
    return _Written("", path.name, entry, [_entry_of(piece, path.name, file.hashes) for piece in pieces])


def _entry_of(piece: Piece, file: str, hashes: dict[str, str]) -> tuple:
    part, start, numel = plain_stretch(piece.shape, piece.part, piece.start, piece.values.numel())
    key = f"{piece.kind}/{piece.name}"
    described = {"file": file, "key": key, "start": start, "numel": numel, "part": part, "sha256": hashes[key]}
    return piece.kind, piece.name, list(piece.shape), described


def manifest_of(state: SaveState, files: dict[str, FileEntry], entries: Iterable[tuple]) -> Manifest:
    """`entries`: kind, name, shape and a piece (the fields of PieceEntry) of whatever the files hold."""
    tensors: dict[str, dict[str, Any]] = {}
    for kind, name, shape, piece in entries:
        tensors.setdefault(kind, {}).setdefault(name, {"shape": shape, "pieces": []})["pieces"].append(piece)
    return Manifest(
        format="lumina-checkpoint",
        version=VERSION,
        step=state.step,
        optimizer_steps=state.optimizer_steps,
        data=state.data,
        model=state.model,
        tensors=tensors,
        files=files,
        software={package: version(package) for package in _PACKAGES},
    )
