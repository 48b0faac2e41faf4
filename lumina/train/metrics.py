"""Where the numbers of a run go: RUN/metrics.jsonl, the progress line, TensorBoard, Weights & Biases."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lumina.checkpoint.manifest import replace_text
from lumina.config.devices import known_tflops
from lumina.config.schema import Config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Counts are of the global batch; seconds are of the whole step, data included."""

    step: int
    loss: float | None  # null where it was not finite
    grad_norm: float | None
    lr: float
    samples: int
    tokens: int
    seconds: float
    tokens_per_second: float
    samples_per_second: float
    tflops_per_device: float
    hardware_tflops_per_device: float  # with what recomputation does again
    mfu: float | None
    peak_memory_bytes: int | None  # of the fullest rank so far: of its GPU's tensors, on a CPU of its process
    skipped: bool
    epoch: int
    data_seconds: float
    save_seconds: float  # for which saving held training up since the line before
    bad_samples: int
    spike: bool
    left_out: bool  # by a rollback; such a step is skipped, and all its counts are 0
    slowest_rank: int | None = None  # steadily slower than its peers; null where none is
    slowest_ratio: float | None = None  # of its own time to theirs


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """bf16 peak of one device: what the configuration says, or a known GPU's; None where neither."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops
    if device.type != "cuda" or config.precision != "bf16":
        return None
    return known_tflops(torch.cuda.get_device_name(device))


class Metrics:
    """Writes each step's numbers. Used as a context manager; only the first rank makes one that writes."""

    def __init__(self, config: Config, first_step: int, enabled: bool):
        """Lines of steps from `first_step` on, left by a run that went further before it was cut off, are dropped."""
        self._enabled = enabled
        self._total = config.train.steps
        self._first_step = first_step
        if not enabled:
            return
        run_dir = Path(config.run.dir)
        self._path = run_dir / METRICS
        if self._path.exists():
            kept = [line for line in self._path.read_text(errors="replace").splitlines() if _step_of(line) < first_step]
            replace_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("ab", buffering=0)
        self._bytes, self._waiting = self._path.stat().st_size, []
        self._writer = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._wandb = _start_wandb(config)
        self._console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=self._total, completed=first_step - 1, line="")
        self._last_line = time.monotonic()

    def __enter__(self) -> "Metrics":
        if self._enabled:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._enabled:
            return
        self._progress.stop()
        self._file.close()
        if self._waiting:
            self.say(f"{len(self._waiting)} lines of {self._path} could not be written and are lost")
        if self._writer:
            self._to_tensorboard(lambda writer: writer.close())
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))

    def say(self, text: str) -> None:
        """A sentence for the person who watches, above the progress line; nothing, where it is empty."""
        if self._enabled and text:
            self._console.print(text, highlight=False, soft_wrap=True)

    def write(self, metrics: StepMetrics) -> None:
        """Record a step."""
        if not self._enabled:
            return
        values = asdict(metrics)
        self._append(json.dumps(values, allow_nan=False) + "\n")
        numbers = {k: float(v) for k, v in values.items() if v is not None and k != "step"}
        for name, number in numbers.items():
            self._to_tensorboard(lambda writer, name=name, number=number: writer.add_scalar(name, number, metrics.step))
        if self._wandb:
            self._wandb.log(numbers, step=metrics.step)
        self._show(metrics)

    def _append(self, line: str) -> None:
        """To metrics.jsonl; lines that the disk does not take wait until it does: no reason to stop training."""
        self._waiting.append(line)
        text = "".join(self._waiting).encode()
        try:
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._drop_what_is_torn()
            if len(self._waiting) == 1:
                self.say(f"{self._path} cannot be written ({error.strerror}): its lines wait until it can")
            return
        self._bytes += len(text)
        self._waiting.clear()

    def _drop_what_is_torn(self) -> None:
        """Whole lines alone stay; where a disk takes not even that, a resume drops what is torn."""
        try:
            self._file.truncate(self._bytes)
        except OSError as error:
            self._bytes = self._path.stat().st_size
            if self._waiting[0] != "\n":
                self.say(f"{self._path} may end in a part of a line ({error.strerror})")
                self._waiting.insert(0, "\n")

    def _to_tensorboard(self, work: Callable[["SummaryWriter"], None]) -> None:
        if self._writer is None:
            return
        try:
            work(self._writer)
        except OSError as error:  # its thread has met it since the last call
            self.say(f"TensorBoard's file cannot be written ({error.strerror}): it gets no more of this run")
            self._writer = None

    def picture(self, path: Path, step: int) -> None:
        """Show a preview that was written to `path`."""
        if not self._enabled or not (self._writer or self._wandb):
            return
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._to_tensorboard(lambda writer: writer.add_image("preview", pixels, step, dataformats="HWC"))
        if self._wandb:
            import wandb

            self._wandb.log({"preview": wandb.Image(pixels)}, step=step)

    def _show(self, metrics: StepMetrics) -> None:
        loss = "not finite, skipped" if metrics.loss is None else f"{metrics.loss:.4f}"
        loss = "left out" if metrics.left_out else loss
        line = f"loss {loss} · {metrics.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=metrics.step, line=line)
        if self._console.is_terminal:
            return
        # In a log file: the first and last step, and one line every ten seconds between.
        now = time.monotonic()
        if metrics.step in (self._first_step, self._total) or now - self._last_line >= 10:
            self._last_line = now
            self.say(f"step {metrics.step}/{self._total} · {line}")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill: dropped


def _start_wandb(config: Config):
    if config.log.wandb_project is None:
        return None
    import wandb

    run_dir = Path(config.run.dir)
    return wandb.init(
        project=config.log.wandb_project, name=run_dir.name, dir=str(run_dir), config=config.model_dump(by_alias=True)
    )
