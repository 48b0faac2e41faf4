"""From items to shards: planned first, written by several processes, and gone on with after a kill.

All work is done in a hidden folder beside OUT, which holds

    plan.jsonl      a line a sample: what goes into it
    journal.jsonl   the command and the hash of the plan, then a line a finished shard
    set/            what is renamed to OUT when all is written
"""

import fcntl
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.order import permutation, random_words
from lumina.data.processes import Report, run_jobs
from lumina.data.recipes.items import Item, Keys, Skips, extension_of
from lumina.data.shard_index import index_path
from lumina.data.write import cut_into_shards, sample_bytes, shard_bytes, sync_folder, write_shard

Items = Callable[[Skips], Iterable[Item]]
Documents = Callable[[Mapping[str, int]], Mapping[str, Any]]
"""JSON files to be written into OUT, name → content, given the samples of each source."""
Progress = Callable[[str, int, int], object]
"""Called with ("listing", samples so far, 0) and ("writing", bytes so far, bytes in all)."""


@dataclass(frozen=True)
class Layout:
    """How samples become shards.

    Attributes:
        shard_size: bytes that no shard exceeds, but one of a single larger sample.
        samples_per_shard: at most so many; None for no limit.
        shuffle: seed of a permutation of all samples of a set; None leaves them in the order of the source.
        workers: processes; None for one a core, at most eight. The bytes do not depend on it.
    """

    shard_size: int = 1 << 30
    samples_per_shard: int | None = None
    shuffle: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Summary:
    """What was written: `bytes` of the tar files; `skipped` by reason, each listed in the file `report`."""

    folder: Path
    samples: int
    shards: int
    bytes: int
    skipped: Mapping[str, int]
    report: Path | None


@dataclass(frozen=True)
class _Job:
    shard: Path
    plan: Path
    lines: np.ndarray  # where in the plan the shard's samples stand, bytes
    samples: int
    bytes: int


def parse_bytes(text: str) -> int:
    """A number of bytes such as 1000000, 500MB (millions) or 2GiB (2³⁰); `ValueError` if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes; give one such as 1000000, 500MB or 2GiB")
    power = " kmgt".index((match[2] or " ").lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def make_shards(
    out: str | Path,
    sources: Mapping[str, Items],
    *,
    arguments: Mapping[str, Any],
    documents: Documents | None = None,
    mend: str,
    layout: Layout,
    progress: Progress | None = None,
) -> Summary:
    """Write each source as a set of shards with indexes.

    Args:
        out: a new or empty folder. It appears when all is written. After a kill the same call goes on.
        sources: folder below `out` ("" for `out` itself) → the items of its set.
        arguments: what the items depend on, as JSON can hold it; unfinished work begun with others is refused.
        documents: see `Documents`.
        mend: what to do about items that were refused, the end of a sentence.
        layout: how samples become shards.
        progress: see `Progress`.

    Raises:
        ValueError: items were refused, a source has none, `out` is not empty or cannot be written, the disk is too
            small, the unfinished work there is of another command, or a file changed meanwhile.
    """
    if layout.workers is not None and layout.workers < 1:
        raise ValueError(f"workers must be at least 1, not {layout.workers}")
    if layout.shuffle is not None and layout.shuffle < 0:
        raise ValueError(f"the seed of --shuffle must be at least 0, not {layout.shuffle}")
    cut_into_shards(np.zeros(0, np.int64), layout.shard_size, layout.samples_per_shard)  # refuses bad limits early
    progress = progress or (lambda stage, done, total: None)
    out = Path(out).resolve()
    work = out.parent / f".{out.name}.making"
    asked = dict(arguments) | {key: value for key, value in asdict(layout).items() if key != "workers"}
    try:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"folder {out} is not empty; shards are written into a new or empty folder")
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            _lock(lock, work)
            journal = _Journal(work / "journal.jsonl")
            try:
                return _make(out, work, journal, sources, asked, documents or (lambda _: {}), mend, layout, progress)
            finally:
                # Without a finished shard there is nothing to go on with.
                if not journal.finished or not (work / "set").is_dir():
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"shards cannot be written to {out} ({error.strerror})") from error


def _make(
    out: Path,
    work: Path,
    journal: "_Journal",
    sources: Mapping[str, Items],
    asked: Mapping[str, Any],
    documents: Documents,
    mend: str,
    layout: Layout,
    progress: Progress,
) -> Summary:
    journal.accept(asked)
    # Where the refusals are listed must outlive the hidden folder.
    skips = Skips(out.parent / f"{out.name}.problems.jsonl")
    skips.report.unlink(missing_ok=True)
    try:
        plan = _Plan(work / "plan.jsonl")
        with plan:
            for folder, source in sources.items():
                plan.add(folder, source(skips), progress)
        skips.settle(mend)
        if empty := [folder for folder, lines in plan.lines.items() if not len(lines)]:
            which = f" for {empty[0]}" if empty[0] else ""
            left_out = f"; left out: {skips.summary()}" if skips.counts else ""
            raise ValueError(f"there are no samples to write{which}{left_out}")
        journal.begin(asked, plan.digest.hexdigest())
        jobs = _jobs(plan, work / "set", out.name, layout)
        _write(jobs, journal, layout, progress)
        counts = {folder: len(lines) for folder, lines in plan.lines.items()}
        return _finish(out, work, jobs, documents(counts), skips)
    except BaseException:
        skips.close()
        if not skips.reported:
            skips.report.unlink(missing_ok=True)
        raise


def _write(jobs: list[_Job], journal: "_Journal", layout: Layout, progress: Progress) -> None:
    missing = [job for job in jobs if not journal.has(job)]
    kept = {path for job in jobs if journal.has(job) for path in (job.shard, index_path(job.shard))}
    for folder in {job.shard.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path not in kept and path.is_file():
                path.unlink()  # what a kill left half done
    total, left = sum(job.bytes for job in jobs), sum(job.bytes for job in missing)
    if missing:
        free = shutil.disk_usage(jobs[0].shard.parent).free
        # The indexes: a hundred-odd bytes a sample and a few thousand a shard.
        needed = left + sum(200 * job.samples + 8192 for job in missing)
        if needed > free:
            raise ValueError(
                f"the disk of {jobs[0].shard.parent} has {free:,} bytes free, and the shards need {needed:,}; "
                "free some, or write elsewhere"
            )
    done = total - left
    progress("writing", done, total)

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress("writing", min(done, total), total)

    for number, _ in run_jobs(_write_one, missing, layout.workers, report):
        journal.note(missing[number])


def _finish(out: Path, work: Path, jobs: list[_Job], documents: Mapping[str, Any], skips: Skips) -> Summary:
    target = work / "set"
    size = sum(job.shard.stat().st_size for job in jobs)
    assert size == sum(job.bytes for job in jobs)  # every one is there, as planned
    for name, content in documents.items():
        _durable(target / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    if skips.counts:
        skips.report.replace(target / "skipped.jsonl")
    for folder in {target, *(job.shard.parent for job in jobs)}:
        sync_folder(folder)
    target.rename(out)
    sync_folder(out.parent)
    report = out / "skipped.jsonl" if skips.counts else None
    return Summary(out, sum(job.samples for job in jobs), len(jobs), size, dict(skips.counts), report)


class _Plan:
    """Writes what goes into each sample to a file, and keeps where it stands there: memory is 16 bytes a sample."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = sha256()
        self.lines: dict[str, np.ndarray] = {}
        self.sizes: dict[str, np.ndarray] = {}
        self._at = self._count = 0

    def __enter__(self) -> "_Plan":
        self._stream = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, folder: str, items: Iterable[Item], progress: Progress) -> None:
        lines, sizes, keys = array("q"), array("q"), Keys()
        self.digest.update(folder.encode() + b"\0")
        for item in items:
            facts = os.stat(item.media)
            key = keys.of(item.name)
            texts = {"txt": item.caption, "json": item.fields}
            contents = {extension_of(item.media): facts.st_size}
            contents |= {name: len(text.encode()) for name, text in texts.items() if text is not None}
            planned = [key, item.media, facts.st_size, facts.st_mtime_ns, item.caption, item.fields]
            line = json.dumps(planned).encode() + b"\n"
            lines.append(self._at)
            sizes.append(sample_bytes(key, contents))
            self.digest.update(line)
            self._stream.write(line)
            self._at += len(line)
            self._count += 1
            if self._count % 1000 == 0:
                progress("listing", self._count, 0)
        self.lines[folder], self.sizes[folder] = np.array(lines, np.int64), np.array(sizes, np.int64)


class _Journal:
    """What is finished. A line counts once it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun: dict[str, Any] | None = None
        self.finished: set[str] = set()
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
            if line.endswith("\n"):
                record = json.loads(line)
                if self.begun is None:
                    self.begun = record
                else:
                    self.finished.add(record["shard"])

    def accept(self, asked: Mapping[str, Any]) -> None:
        if self.begun is None or not self.finished:
            return
        before, now = self.begun["arguments"], json.loads(json.dumps(asked))
        if before != now:
            name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
            raise ValueError(
                f"{self.path.parent} holds unfinished shards that were begun with {name}={before.get(name)}, now "
                f"{name}={now.get(name)}; repeat the command as it was, or delete that folder to start anew"
            )

    def begin(self, asked: Mapping[str, Any], plan: str) -> None:
        if self.finished:
            if self.begun["plan"] != plan:
                raise ValueError(
                    "the files or captions changed since the shards were begun; delete the unfinished ones in "
                    f"{self.path.parent} to start anew"
                )
            # The last line may be torn; what is written behind it must not be.
            _durable(self.path, "".join(_line(record) for record in self._records()))
            return
        self.begun = {"version": 1, "arguments": dict(asked), "plan": plan}
        _durable(self.path, _line(self.begun))

    def has(self, job: _Job) -> bool:
        return _name(job) in self.finished and job.shard.is_file() and index_path(job.shard).is_file()

    def note(self, job: _Job) -> None:
        self.finished.add(_name(job))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line({"shard": _name(job)}))
            stream.flush()
            os.fsync(stream.fileno())

    def _records(self) -> Iterator[dict[str, Any]]:
        yield self.begun
        yield from ({"shard": name} for name in sorted(self.finished))


def _jobs(plan: _Plan, target: Path, name: str, layout: Layout) -> list[_Job]:
    jobs = []
    for folder, lines in plan.lines.items():
        sizes = plan.sizes[folder]
        if layout.shuffle is not None:
            order = permutation(random_words(len(lines), "shards", layout.shuffle))
            lines, sizes = lines[order], sizes[order]
        prefix = re.sub(r"^[^\w]|[^\w.-]", "_", Path(folder).name or name)
        starts = cut_into_shards(sizes, layout.shard_size, layout.samples_per_shard)
        for number, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            shard = target / folder / f"{prefix}-{number:06d}.tar"
            size = shard_bytes(int(sizes[start:stop].sum()))
            jobs.append(_Job(shard, plan.path, lines[start:stop], stop - start, size))
    return jobs


def _write_one(job: _Job, report: Report) -> None:
    try:
        write_shard(job.shard, _samples(job, report))
    except OSError as error:
        raise ValueError(f"shard {job.shard} cannot be written ({error.strerror})") from error


def _samples(job: _Job, report: Report) -> Iterator[dict[str, Any]]:
    unreported = 0
    with job.plan.open("rb") as plan:
        for at in job.lines.tolist():
            plan.seek(at)
            key, media, size, modified, caption, fields = json.loads(plan.readline())
            content = _unchanged(media, size, modified)
            sample = {"__key__": key, extension_of(media): content, "txt": caption, "json": fields}
            yield {name: value for name, value in sample.items() if value is not None}
            unreported += size
            if unreported >= 1 << 24:
                report(unreported)
                unreported = 0
    report(unreported)


def _unchanged(media: str, size: int, modified: int) -> bytes:
    try:
        with open(media, "rb") as stream:
            facts = os.fstat(stream.fileno())
            content = stream.read()
    except OSError as error:
        raise ValueError(f"{media} cannot be read ({error.strerror})") from error
    if (facts.st_size, facts.st_mtime_ns) != (size, modified) or len(content) != size:
        raise ValueError(f"{media} changed while shards were made of it")
    return content


def _lock(lock: Any, work: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing these shards now (it holds {work / 'lock'})") from error


def _durable(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _name(job: _Job) -> str:
    return f"{job.shard.parent.name}/{job.shard.name}"
