"""Whether a run is well: spikes of its loss, the batches that are left out for them, and bits that flip."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import Field, model_validator

from lumina.checkpoint.manifest import checkpoints_of, replace_text, sync
from lumina.config.schema import Config, Section
from lumina.parallel.collectives import all_gather
from lumina.parallel.engine import Engine
from lumina.parallel.fragments import Held
from lumina.parallel.mesh import Mesh
from lumina.train.bits import Watch, dissenters
from lumina.train.ema import EMA
from lumina.train.metrics import METRICS

RECORD = "skipped_batches.jsonl"
_SIGMA_OF_MAD = 1.4826  # of a normal distribution
_LEAST_SPREAD = 0.01  # of the median: values that hardly vary make no spike of a ripple
_NAMED = 6


class SpikeDetector:
    """Above median + factor · max(1.4826 · MAD, 1% of the median) of the last `window` values, a value is a spike.

    MAD is the median of the distances from the median: a few spikes in the window move neither. With fewer values
    than `window` there is no verdict.
    """

    def __init__(self, factor: float, window: int, values: Iterable[float] = ()):
        self._factor, self._values = factor, deque(values, maxlen=window)

    @property
    def limit(self) -> float:
        """Infinite until the window is full."""
        if len(self._values) < self._values.maxlen:
            return math.inf
        middle = median(self._values)
        spread = _SIGMA_OF_MAD * median(abs(value - middle) for value in self._values)
        return middle + self._factor * max(spread, _LEAST_SPREAD * abs(middle))

    def judge(self, value: float) -> float | None:
        """The limit that `value` is above, or None; it is one of the last values from then on."""
        limit = self.limit
        self._values.append(value)
        return limit if value > limit else None


class LeftOut(Section):
    """A line of skipped_batches.jsonl: the batches of steps [first, last] are not trained on."""

    first: int = Field(ge=1)
    last: int
    checkpoint: int = Field(ge=0, description="step that the run went back to")
    spike_of: Literal["loss", "grad_norm"]
    value: float = Field(description="of step `last`")
    limit: float

    @model_validator(mode="after")
    def _in_order(self) -> "LeftOut":
        if not self.checkpoint < self.first <= self.last:
            raise ValueError(f"checkpoint {self.checkpoint} < first {self.first} ≤ last {self.last} does not hold")
        return self


def read_left_out(run_dir: Path) -> list[LeftOut]:
    """What a run leaves out, in the order in which it was decided.

    Raises:
        ValueError: naming the line that is wrong.
    """
    path = run_dir / RECORD
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entries.append(LeftOut.model_validate(json.loads(line)))
        except ValueError as error:  # broken JSON and pydantic's errors alike
            reason = " ".join(str(error).splitlines()[:3])
            raise ValueError(
                f"{path}, line {number}: no record of batches left out ({reason}); restore it, or remove the line to "
                "train on them"
            ) from error
    return entries


def last_values(run_dir: Path, key: str, step: int, count: int) -> list[float]:
    """The newest `count` values of `key` in metrics.jsonl up to `step`, of steps that were trained on, oldest first."""
    path = run_dir / METRICS
    if not path.is_file():
        return []
    values: deque[float] = deque(maxlen=count)
    with path.open() as lines:
        for line in lines:
            numbers = json.loads(line)
            value = numbers.get(key)
            if numbers["step"] <= step and not numbers.get("skipped", True) and value is not None:
                values.append(float(value))
    return list(values)


class Health:
    """What a run's loop asks at each step. Every rank makes one; verdicts are the same on all.

    Raises:
        ValueError: for a record of batches left out that cannot be read.
    """

    def __init__(self, config: Config, mesh: Mesh, engine: Engine, ema: EMA, step: int):
        """`step` is done; metrics.jsonl goes no further."""
        self._settings, self._mesh, self._run_dir = config.health, mesh, Path(config.run.dir)
        settings = self._settings
        told: tuple[str, list[LeftOut], list[float]] = ("", [], [])
        if mesh.is_first:
            try:
                values = last_values(self._run_dir, settings.spike_of, step, settings.spike_window)
                told = ("", read_left_out(self._run_dir), values)
            except (ValueError, OSError) as error:
                told = (str(error), [], [])
        problem, self._left_out, values = mesh.from_first(told)
        if problem:
            raise ValueError(problem)
        self._detector = SpikeDetector(settings.spike_factor, settings.spike_window, values)
        self._spike: tuple[float, float] | None = None
        replicated = config.parallel.zero_stage == 0

        def held() -> Iterator[Held]:
            yield from engine.held()
            for fragment, values in zip(ema.fragments, ema.values, strict=True):
                yield Held("ema", fragment.name, values, replicated)

        self._held, self._watch = held, Watch(held, settings.check_every) if settings.check_every else None
        self._found: list[str] = []

    # Spikes.

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of `step` is one of those that a rollback left out."""
        return any(entry.first <= step <= entry.last for entry in self._left_out)

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Of a step that was trained on; both are the same on every rank."""
        if self._settings.spike == "none":
            return False
        value = loss if self._settings.spike_of == "loss" else grad_norm
        limit = self._detector.judge(value)
        self._spike = None if limit is None else (value, limit)
        return limit is not None

    def must_go_back(self, step: int, say: Callable[[str], None]) -> bool:
        """After a spike at `step`: whether the run goes back to its newest checkpoint. It is recorded by then.

        Raises:
            RuntimeError: on every rank, where it has gone back to that checkpoint too often.
        """
        value, limit = self._spike
        what = f"step {step}: the {self._settings.spike_of} of {value:.4g} is a spike (above {limit:.4g})"
        if self._settings.spike == "warn":
            say(what)
            return False
        decided = self._decide(step, value, limit) if self._mesh.is_first else None
        entry, reason, fatal = self._mesh.from_first(decided)
        if fatal:
            raise RuntimeError(f"{what}, and {reason}")
        if entry is None:
            say(f"{what}; {reason}: the run goes on with it")
            return False
        say(
            f"{what}: going back to the checkpoint of step {entry.checkpoint}; the batches of steps {entry.first} to "
            f"{entry.last} are left out ({self._run_dir / RECORD})"
        )
        return True

    def _decide(self, step: int, value: float, limit: float) -> tuple[LeftOut | None, str, bool]:
        """What is left out, or why nothing, and whether the run must stop. On the first rank, which writes it down."""
        folders = checkpoints_of(self._run_dir)
        if not folders:
            return None, "there is no checkpoint to go back to yet", False
        newest = int(folders[-1].name.removeprefix("step_"))
        before = sum(entry.checkpoint == newest for entry in self._left_out)
        if before >= self._settings.rollback_limit:
            reason = (
                f"the run has gone back to the checkpoint of step {newest} {before} times already "
                f"(health.rollback_limit={self._settings.rollback_limit}); look at the data and the learning "
                "rate, or set health.spike=warn, then resume"
            )
            return None, reason, True
        entry = LeftOut(
            first=newest + 1,
            last=step,
            checkpoint=newest,
            spike_of=self._settings.spike_of,
            value=value,
            limit=limit,
        )
        lines = [one.model_dump_json() for one in (*self._left_out, entry)]
        try:
            replace_text(self._run_dir / RECORD, "".join(f"{line}\n" for line in lines))
            sync(self._run_dir)  # or a power cut could take back the renaming
        except OSError as error:
            return None, f"what to leave out cannot be recorded ({error.strerror or error})", False
        return entry, "", False

    # Bits.

    def before_update(self) -> None:
        """Compare what this rank holds with what it held after the last update."""
        if self._watch is not None:
            rank = self._mesh.world.rank
            self._found += [
                f"{held.kind} of {held.name} on rank {rank} (between two updates)" for held in self._watch.changed()
            ]

    def after_update(self) -> None:
        """What this rank holds now must stay as it is up to the next update."""
        if self._watch is not None:
            self._watch.seal()

    @property
    def found(self) -> int:
        """Flips that this rank knows of; summed over ranks, what `examine` is to be told."""
        return len(self._found)

    def examine(self, step: int, found: float, compare: bool) -> None:
        """After `step`: compare replicas every `health.check_every` steps, and whenever `compare` asks for it.

        Raises:
            RuntimeError: on every rank, where a rank has found a flip, or replicas differ; it names them.
        """
        if self._watch is None:
            return
        compare = compare or step % self._settings.check_every == 0
        if compare:
            self._found += self._differences()
        if not compare and not found:
            return
        lists = self._mesh.gather(self._found)
        everywhere = self._mesh.from_first(None if lists is None else [one for of_rank in lists for one in of_rank])
        if not everywhere:
            return
        named = "; ".join(everywhere[:_NAMED])
        more = f"; and {len(everywhere) - _NAMED} more" if len(everywhere) > _NAMED else ""
        folders = checkpoints_of(self._run_dir)
        newest = f"go on from {folders[-1]}" if folders else "start again"
        raise RuntimeError(
            f"step {step}: bits have flipped that nothing was to change: {named}{more}. Nothing was saved after it was "
            f"found; test the memory of that device, or leave it out, then {newest} by the same command"
        )

    def _differences(self) -> list[str]:
        """In what the replicas of this gradient axis differ; the first of them says it for all."""
        mesh, axis = self._mesh, self._mesh.gradient
        replicated = [held.replicated for held in self._held()]
        if axis.size == 1 or not any(replicated):
            return []
        sums = self._watch.sums()
        here = [i for i, yes in enumerate(replicated) if yes]
        of_ranks = all_gather(sums[here].to(mesh.device), axis).cpu()
        if axis.rank:
            return []
        found, held = [], list(self._held())
        for column, groups in dissenters(of_ranks).items():
            kind, name, *_ = held[here[column]]
            ranks = [[axis.ranks[replica] for replica in group] for group in groups]
            found.append(f"{kind} of {name} {_who_differs(ranks, sum(map(len, ranks)) == axis.size)}")
        return found


def _who_differs(groups: list[list[int]], all_of_them: bool) -> str:
    """In words: the ranks that differ from most others, or, where there is no majority, who agrees with whom."""
    said = [f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}" for ranks in groups]
    if not all_of_them:
        return f"on {' and on '.join(said)} (the other replicas agree)"
    return f"on {' or on '.join(said)} (the replicas differ, and too few agree to say which is right)"
