"""What messages take between ranks that share the cores of this machine."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

_SMALL, _LARGE = 1024, 2**21  # elements, fp32
_REPEATS = {_SMALL: 30, _LARGE: 5}
_PATIENCE, _GRACE = 120, 5  # seconds


@dataclass(frozen=True)
class GlooSpeed:
    """Of an all-reduce, which gloo passes round a ring, all ranks at once.

    hop: seconds from one rank to the next, beside bytes.
    bandwidth: bytes a second that each rank sends.
    """

    hop: float
    bandwidth: float


def gloo_speed(ranks: int) -> GlooSpeed:
    """Measured between that many new processes of this machine, at least two.

    Raises:
        RuntimeError: where one of them ends or says nothing for two minutes.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_measure, args=(Path(folder) / "store", rank, ranks, there), daemon=True)
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            there.close()  # or the end of the processes would not be seen
            small, large = here.recv() if here.poll(_PATIENCE) else (0.0, 0.0)
            for process in processes:
                process.join(_GRACE)
        except EOFError:
            small = large = 0.0
        finally:
            for process in processes:
                process.kill()
                process.join()
    if not small:
        raise RuntimeError(f"{ranks} processes could not measure what gloo's messages take between them")
    hops = 2 * (ranks - 1)
    return GlooSpeed(small / hops, 4 * _LARGE * hops / ranks / large)


def _measure(store: Path, rank: int, ranks: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    times = [_seconds(torch.ones(elements), dist.all_reduce, repeats) for elements, repeats in _REPEATS.items()]
    dist.barrier()
    if rank == 0:
        answer.send(tuple(times))
    dist.destroy_process_group()


def _seconds(tensor: torch.Tensor, exchange: Callable[[torch.Tensor], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        exchange(tensor)
        took.append(time.perf_counter() - start)
    return median(took)
