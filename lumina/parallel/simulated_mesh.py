"""A mesh of any number of processes of which one is there: torch's fake process group, over which nothing travels."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from lumina.config.schema import ParallelConfig
from lumina.parallel.mesh import Axis, Mesh, World

# What `mesh` has megatron-core make, as ranks vary along these of the five axes.
_VARIED = {
    "data": ("data",),
    "pipeline": ("pipeline",),
    "ring": ("ring",),
    "ulysses": ("ulysses",),
    "tensor": ("tensor",),
    "gradient": ("data", "ring", "ulysses"),
    "weights": ("pipeline", "tensor"),
    "replica": ("pipeline", "ring", "ulysses", "tensor"),
}


@contextmanager
def simulated_mesh(parallel: ParallelConfig, world_size: int, rank: int, device: torch.device) -> Iterator[Mesh]:
    """The mesh as rank `rank` of `world_size` sees it. Collectives return at once, and leave what they fill as it is.

    The layout is one that `layout.check_layout` has let pass.

    Raises:
        ValueError: for a rank that is not there, or where this process has process groups.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is none of {world_size} ranks, which are numbered from 0 to {world_size - 1}")
    if dist.is_initialized():
        raise ValueError("a simulation makes process groups, and this process has some: close its run's before")
    # They register what collectives give of fake tensors (torch before 2.13 wants that), and the backend.
    from torch.distributed._tools import fake_collectives  # noqa: F401
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        ranks = axis_ranks(parallel, world_size, rank)
        axes = {name: _axis(of_axis, rank) for name, of_axis in ranks.items()}
        yield Mesh(World(rank, world_size, 0), device, **axes, sequence_parallel=parallel.sequence)
    finally:
        dist.destroy_process_group()


def axis_ranks(parallel: ParallelConfig, world_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """World ranks of every axis that `rank` is on, in the order of the axis."""
    inner = {"ring": parallel.ring, "ulysses": parallel.ulysses, "tensor": parallel.tensor}
    data = world_size // (parallel.pipeline * parallel.ring * parallel.ulysses * parallel.tensor)
    sizes = {"pipeline": parallel.pipeline, "data": data} | inner
    grid = np.arange(world_size).reshape(*sizes.values())
    place = dict(zip(sizes, np.unravel_index(rank, grid.shape), strict=True))
    found = {}
    for name, varied in _VARIED.items():
        index = tuple(slice(None) if axis in varied else place[axis] for axis in sizes)
        found[name] = tuple(grid[index].ravel().tolist())
    return found


def _axis(ranks: tuple[int, ...], rank: int) -> Axis:
    # Groups that this rank is in, and no others: all of a large world would take minutes.
    group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
    return Axis(len(ranks), ranks.index(rank), group, ranks)
