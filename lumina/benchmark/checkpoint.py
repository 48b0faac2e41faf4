"""`lumina benchmark checkpoint`: saving, loading and converting, beside `cp` and `torch.save` of the same bytes."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lumina.benchmark import record
from lumina.benchmark.noise import mesh_of
from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import EMA, MOMENTS, WEIGHTS, step_folder
from lumina.checkpoint.save import Piece, Saver, SaveState
from lumina.config.load import validate
from lumina.config.schema import Config, ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.presets import PRESETS
from lumina.parallel.mesh import Mesh
from lumina.parallel.peak_memory import peak_resident_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASS_SECONDS = 2.0
"""Of products that stand for a forward and backward pass; a step of such models takes longer on any machine."""
STATES = {"training": (WEIGHTS, EMA, *MOMENTS), "weights": (WEIGHTS,)}


@dataclass(frozen=True)
class Row:
    """One go at one thing."""

    what: str
    repetition: int
    bytes: int
    seconds: float
    peak_bytes: int | None  # of memory beyond the tensors themselves; None for another program's


def benchmark_checkpoint(arguments: argparse.Namespace) -> None:
    """The verb: measures, writes each row to `--out` when it is there, and prints a table at the end."""
    if arguments.model not in PRESETS:
        raise ValueError(f"--model {arguments.model} is none of {', '.join(PRESETS)}")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats {arguments.repeats}: it is at least 1")
    record.check_writable(arguments.out)
    facts = record.surroundings(torch.device("cpu"))
    facts["packages"] |= record.versions(("safetensors",))
    print(record.heading(facts))
    results = record.Results(arguments.out, facts)
    sizes = FlagDiTConfig.from_dict({"preset": arguments.model, "in_channels": 4, "num_classes": 1000})
    with _folder(arguments.dir) as folder, mesh_of(ParallelConfig()) as mesh:
        state = _state(sizes, arguments.state, _DTYPES[arguments.dtype])
        total = sum(piece.values.nbytes for piece in state)
        print(f"{len(state)} tensors of {total / 1e9:.2f} GB together.\n")
        check_space(folder, total)
        bench = _Bench(folder, state, total, sizes, mesh)
        for repetition in range(arguments.repeats):
            for what, work in bench.works(arguments.state == "training").items():
                print(f"{what}, repetition {repetition + 1} …", file=sys.stderr)
                results.add(what, work(what, repetition))
    if not results.rows:
        raise RuntimeError(f"nothing could be measured{results.said()}")
    print(f"{table_of(results.rows)}{results.said()}")


def check_space(folder: Path, total: int) -> None:
    """Refuse a disk too small for what is written at once.

    Raises:
        ValueError: naming what is there and what it takes.
    """
    free, needed = shutil.disk_usage(folder).free, 2 * total + (1 << 28)
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, and this takes {needed / 1e9:.1f}; name another --dir, or a "
            "smaller --model"
        )


@contextmanager
def _folder(name: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lumina-benchmark-", dir=name) as made:
        yield Path(made)


def _state(sizes: FlagDiTConfig, state: str, dtype: torch.dtype) -> list[Piece]:
    """Tensors of a model's names and shapes, full of numbers that do not compress."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in FlagDiT(sizes).named_parameters()}
    noise = torch.randn(1 << 24).to(dtype)
    pieces = []
    for kind in STATES[state]:
        for name, shape in shapes.items():
            values = torch.empty(torch.Size(shape).numel(), dtype=dtype)
            for start in range(0, values.numel(), noise.numel()):
                stretch = values[start : start + noise.numel()]
                stretch.copy_(noise[: stretch.numel()])
            pieces.append(Piece(kind, name, shape, 0, values))
    return pieces


class _Bench:
    def __init__(self, folder: Path, state: list[Piece], total: int, sizes: FlagDiTConfig, mesh: Mesh):
        self.folder, self.state, self.total, self.sizes, self.mesh = folder, state, total, sizes, mesh
        self.run = folder / "run"
        self.background = Saver(self.run, _config(self.run, asynchronous=True), mesh)

    def works(self, of_training: bool) -> dict[str, Callable[[str, int], Iterator[Row]]]:
        """In the order in which they need each other's files."""
        works = {
            "save": self.save,
            "cp + fsync": self.copy,
            "load": self.load,
            "resume": self.resume,
            "cat": self.cat,
            "convert": lambda what, repetition: self.convert(what, repetition, "--no-verify"),
            "convert with proof": self.convert,
            "torch.save + fsync": self.torch_save,
            "torch.load": self.torch_load,
            "asynchronous save": self.save_beside,
        }
        return works if of_training else {what: works[what] for what in works if "asynchronous" not in what}

    def save(self, what: str, repetition: int) -> Iterator[Row]:
        shutil.rmtree(self.run, ignore_errors=True)
        saver = Saver(self.run, _config(self.run, asynchronous=False), self.mesh)

        def work() -> None:
            saver.start(self._named(1), self.state)
            saver.finish()

        yield self._timed(what, repetition, work)
        saver.close()

    def copy(self, what: str, repetition: int) -> Iterator[Row]:
        copy = self.folder / "copy"
        with open(os.devnull, "wb") as nowhere:  # in memory, as is what the save writes
            subprocess.run(["cat", str(self._file())], stdout=nowhere, check=True)
        seconds = _seconds(
            lambda: (
                subprocess.run(["cp", "--reflink=never", str(self._file()), str(copy)], check=True),
                _flush(copy),
            )
        )
        copy.unlink()
        yield Row(what, repetition, self.total, seconds, None)

    def load(self, what: str, repetition: int) -> Iterator[Row]:
        """Each tensor checked and put in place, from a disk whose pages are in no cache."""
        _forget(self._file())
        yield self._timed(what, repetition, lambda: self._put_in_place(Checkpoint(step_folder(self.run, 1))))

    def resume(self, what: str, repetition: int) -> Iterator[Row]:
        """As a run goes on: all is checked before any of it is put in place."""
        _forget(self._file())

        def work() -> None:
            checkpoint = Checkpoint(step_folder(self.run, 1))
            if problem := checkpoint.damage():
                raise RuntimeError(problem)
            self._put_in_place(checkpoint)

        yield self._timed(what, repetition, work)

    def _put_in_place(self, checkpoint: Checkpoint) -> None:
        for piece in self.state:
            piece.values.copy_(checkpoint.read(piece.kind, piece.name))

    def cat(self, what: str, repetition: int) -> Iterator[Row]:
        _forget(self._file())
        with open(os.devnull, "wb") as nowhere:
            seconds = _seconds(lambda: subprocess.run(["cat", str(self._file())], stdout=nowhere, check=True))
        yield Row(what, repetition, self.total, seconds, None)

    def convert(self, what: str, repetition: int, *options: str) -> Iterator[Row]:
        """The averaged weights, or the only ones, to an inference folder in bf16."""
        _forget(self._file())
        target, weights = self.folder / "converted", "ema" if any(p.kind == EMA for p in self.state) else "model"
        command = [sys.executable, "-m", "lumina", "convert", str(step_folder(self.run, 1)), str(target)]
        command += ["--to", "inference", "--weights", weights, "--dtype", "bf16", *options]
        start = time.perf_counter()
        process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
        while process.poll() is None:
            # Not what the system tells of it when it has ended: that begins with the peak of this process.
            peak = max(peak, peak_resident_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} failed")
        read = sum(piece.values.nbytes for piece in self.state if piece.kind == (EMA if weights == "ema" else WEIGHTS))
        shutil.rmtree(target)
        yield Row(what, repetition, read, seconds, peak)

    def torch_save(self, what: str, repetition: int) -> Iterator[Row]:
        path = self.folder / "state.pt"
        tensors = {(piece.kind, piece.name): piece.values for piece in self.state}
        shutil.rmtree(self.run)

        def work() -> None:
            torch.save(tensors, path)
            _flush(path)

        yield self._timed(what, repetition, work)

    def torch_load(self, what: str, repetition: int) -> Iterator[Row]:
        path = self.folder / "state.pt"
        _forget(path)

        def work() -> None:
            loaded: dict[tuple[str, str], Tensor] = torch.load(path, weights_only=True, mmap=True)
            for piece in self.state:
                piece.values.copy_(loaded[piece.kind, piece.name])

        yield self._timed(what, repetition, work)
        path.unlink()

    def save_beside(self, what: str, repetition: int) -> Iterator[Row]:
        """How long training waits: to begin, and, after a pass, before its update. The first takes memory for all."""
        shutil.rmtree(self.run, ignore_errors=True)
        product, written = torch.randn(1024, 1024), time.perf_counter()
        self.background.start(self._named(1), self.state)
        began = time.perf_counter()
        while time.perf_counter() < began + PASS_SECONDS:
            torch.mm(product, product)
        self.background.before_update()
        waited = self.background.take_seconds()
        self.background.finish()
        yield Row(f"{what}: training waits", repetition, self.total, waited, None)
        yield Row(f"{what}: until it is whole", repetition, self.total, time.perf_counter() - written, None)

    def _named(self, step: int) -> SaveState:
        return SaveState(step, step, data={}, model=self.sizes.to_dict())

    def _file(self) -> Path:
        return step_folder(self.run, 1) / "rank_00000.safetensors"

    def _timed(self, what: str, repetition: int, work: Callable[[], object]) -> Row:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = peak_resident_bytes()
        seconds = _seconds(work)
        return Row(what, repetition, self.total, seconds, peak_resident_bytes() - before)


def _config(run: Path, asynchronous: bool) -> Config:
    tree = {
        "run": {"dir": str(run)},
        "model": {"preset": "600m"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1},
        "checkpoint": {"async": asynchronous},
    }
    return validate(tree, "benchmark")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Drop a file's pages from memory, so that reading it is reading the disk."""
    _flush(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table_of(rows: list[Row]) -> str:
    """A line for each thing: the median of its goes, and `cp` against it."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.what, []).append(row)
    rates = {what: statistics.median(row.bytes / row.seconds for row in group) for what, group in groups.items()}
    copy = rates.get("cp + fsync")
    lines = []
    for what, group in groups.items():
        of_copy = f"{rates[what] / copy:.0%}" if copy and what in ("save", "torch.save + fsync") else "–"
        seconds = sorted(row.seconds for row in group)
        peaks = [row.peak_bytes for row in group if row.peak_bytes is not None]
        peak = f"{max(peaks) / 2**20:,.0f}" if peaks else "–"
        spread = f"{seconds[0]:.2f} – {seconds[-1]:.2f}"
        lines.append((what, f"{statistics.median(seconds):.2f}", spread, f"{rates[what] / 1e9:.2f}", of_copy, peak))
    return record.table(["", "seconds", "range", "GB/s", "of cp + fsync", "peak memory, MiB"], lines)
