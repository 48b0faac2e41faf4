"""Independent jobs over several processes, such as one a shard."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Report = Callable[[int], object]
"""Called by a job with the bytes it has done since it last called."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Any, Report], Any], jobs: Sequence[Any], workers: int | None, report: Report
) -> Iterator[tuple[int, Any]]:
    """(number of the job, what `function(job, report)` returned), as they are done.

    Args:
        function: found by its name from another process.
        jobs: small enough to be sent.
        workers: processes, ≥ 1; None for one a core, at most eight. With one, or one job, everything runs in this
            process. They end with the iterator, and at once when this process is killed.
        report: called here with what the jobs report.

    Raises:
        ValueError: raised by a job.
        RuntimeError: a process died, or a job raised another error.
    """
    workers = min(usable_cores(), 8) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if min(workers, len(jobs)) < 2:
        for number, job in enumerate(jobs):
            yield number, function(job, report)
        return
    context = process_context()
    waiting = iter(range(len(jobs)))
    running: dict[Connection, tuple[Any, int]] = {}
    try:
        for _, number in zip(range(min(workers, len(jobs))), waiting, strict=False):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, function), daemon=True)
            process.start()
            there.close()
            running[here] = (process, number)
            here.send(jobs[number])
        while running:
            for connection in wait(list(running)):
                process, number = running[connection]
                kind, content = _received(connection, process)
                if kind == "report":
                    report(content)
                    continue
                following = next(waiting, None)
                if following is None:
                    connection.close()
                    del running[connection]
                else:
                    running[connection] = (process, following)
                    connection.send(jobs[following])
                yield number, content
    finally:
        for connection, (process, _) in running.items():
            process.terminate()
            connection.close()


def _received(connection: Connection, process: Any) -> tuple[str, Any]:
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise RuntimeError(
            f"a worker process died (exit code {process.exitcode}); was it out of memory? run again with fewer workers"
        ) from error
    if kind in ("refused", "failed"):
        sentence, details = content
        error = ValueError(sentence) if kind == "refused" else RuntimeError(f"a worker process failed: {sentence}")
        error.add_note(details)
        raise error
    return kind, content


def _work(connection: Connection, function: Callable[[Any, Report], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends its workers
    end_with_the_caller()
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = ("done", function(job, lambda count: connection.send(("report", count))))
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: it is raised again in the caller
            kind = "refused" if isinstance(error, ValueError) else "failed"
            sentence = str(error) if kind == "refused" else f"{type(error).__name__}: {error}"
            answer = (kind, (sentence, traceback.format_exc()))
        connection.send(answer)


def end_with_the_caller() -> None:
    """In a process of `process_context`: end at once when the process that asked for it is killed."""
    # Its parent is the fork server, which lives as long as its children do: without this a killed caller would leave
    # both behind for ever.
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="caller-watch", daemon=True).start()


def process_context() -> multiprocessing.context.BaseContext:
    """How processes are started: by a fork server, which imports the data room once for all of them."""
    # Not fork: the caller may hold CUDA, threads and locks, which a forked child would inherit broken.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # There is one server for all: what the first caller names is imported.
    context.set_forkserver_preload(["lumina.data.workers", "lumina.data.check_shard", "lumina.data.recipes.making"])
    return context
