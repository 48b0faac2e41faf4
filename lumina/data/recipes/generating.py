"""Shards of samples that are made by a function of (seed, number): any number of processes makes the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lumina.data.order import random_words
from lumina.data.processes import Report, run_jobs
from lumina.data.write import complete_folder, write_shard

Progress = Callable[[int, int], object]
"""Called with (samples so far, samples in all)."""
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What was written."""

    samples: int
    shards: int


@dataclass(frozen=True)
class _Job:
    make: Callable[[int], Mapping[str, Any]]
    shard: Path
    numbers: range


class Draws:
    """The random draws of one sample, one after another.

    Args:
        purpose: of the stream; another purpose is another stream.
        seed: of the data set.
        number: of the sample.
    """

    _AT_ONCE = 32

    def __init__(self, purpose: str, seed: int, number: int) -> None:
        self._words = iter(random_words(self._AT_ONCE, purpose, seed, number).tolist())

    def below(self, count: int) -> int:
        """One of 0 … count - 1."""
        return next(self._words) % count

    def choice(self, of: Sequence[T]) -> T:
        """One of them, all as likely."""
        return of[self.below(len(of))]

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * (next(self._words) >> 11) / 2.0**53


def generate_shards(
    out: str | Path,
    make: Callable[[int], Mapping[str, Any]],
    count: int,
    *,
    name: str,
    samples_per_shard: int = 500,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write samples 0 … count - 1 into `out/NAME-000000.tar`, … with the index of each beside it.

    The folder appears when all is written, and not at all after a failure.

    Args:
        out: a new or empty folder.
        make: the sample of a number, as `write_shards` takes it; can be sent to another process.
        count: samples, ≥ 1.
        name: first part of the file names.
        samples_per_shard: samples of each shard but the last.
        workers: processes, as in `run_jobs`; each makes whole shards.
        progress: see `Progress`.

    Raises:
        ValueError: a number is too small, the folder is not empty or cannot be written, or `make` refuses.
    """
    if count < 1:
        raise ValueError(f"the number of samples must be at least 1, not {count}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, count)

    report(0)
    with complete_folder(out) as folder:
        jobs = [
            _Job(make, folder / f"{name}-{shard:06d}.tar", range(first, min(first + samples_per_shard, count)))
            for shard, first in enumerate(range(0, count, samples_per_shard))
        ]
        for _ in run_jobs(_write_one, jobs, workers, report):
            pass
    return Summary(count, len(jobs))


def check_seed(seed: int) -> None:
    """`ValueError` unless it is at least 0."""
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, not {seed}")


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy` holds it."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _write_one(job: _Job, report: Report) -> None:
    def samples():
        for number in job.numbers:
            yield job.make(number)
            report(1)

    try:
        write_shard(job.shard, samples())
    except OSError as error:
        raise ValueError(f"shard {job.shard.name} cannot be written ({error.strerror})") from error
