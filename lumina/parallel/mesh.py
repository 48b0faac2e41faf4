"""Which process is which: the world as the launcher describes it, and the mesh axes laid over it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.config.schema import ParallelConfig

# How each launcher tells a process its rank, the world size and the rank on its host.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
)
_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size)."""

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment() -> "World":
        """One process unless a launcher says otherwise.

        Raises:
            ValueError: where a launcher sets a part of what is needed, or nothing tells where rank 0 listens.
        """
        for rank, size, local_rank in _LAUNCHERS:
            if rank not in os.environ or size not in os.environ:
                continue
            world = World(int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local_rank, "0")))
            if world.size > 1 and ("MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ):
                raise ValueError(
                    f"{size}={world.size} but MASTER_ADDR and MASTER_PORT are not set; "
                    "set them to a host and free port of rank 0, or launch with torchrun or deepspeed"
                )
            return world
        return World(0, 1, 0)


def check_layout(parallel: ParallelConfig, precision: str) -> None:
    """Refuse what cannot run, before any process group is made.

    Raises:
        ValueError: naming the key that does not fit and what would.
    """
    for axis in ("tensor", "pipeline", "ring", "ulysses"):
        if getattr(parallel, axis) != 1:
            raise ValueError(
                f"parallel.{axis}={getattr(parallel, axis)}: this version runs data parallel with ZeRO alone; "
                f"set parallel.{axis}=1"
            )
    if parallel.sequence:
        raise ValueError(
            "parallel.sequence shards activations over tensor-parallel ranks; with parallel.tensor=1 set it to false"
        )
    if precision == "bf16" and parallel.zero_stage == 0:
        raise ValueError(
            "precision=bf16 needs parallel.zero_stage 1, 2 or 3: DeepSpeed keeps fp32 master weights and fp32 "
            "gradient sums there alone; with one process stage 1 costs nothing over 0"
        )


@dataclass(frozen=True)
class Mesh:
    """The axes, and this process's place on each. Passed to whoever needs it; there is no global one."""

    world: World
    device: torch.device

    @property
    def data_size(self) -> int:
        return self.world.size

    @property
    def data_rank(self) -> int:
        return self.world.rank

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and writes what all ranks share."""
        return self.world.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the data axis, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: object) -> list | None:
        """A small picklable value of every rank, in rank order, on the first; None elsewhere."""
        values = [None] * self.world.size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def sum_to_first(self, tensor: Tensor) -> None:
        """In place: on the first process the sum over all; what it holds elsewhere is left undefined."""
        dist.reduce(tensor, dst=0)

    def barrier(self) -> None:
        self.sum([0.0])


def open_mesh(parallel: ParallelConfig, precision: str) -> Mesh:
    """Start process groups: nccl where each rank has a GPU, gloo elsewhere. Close with `close_mesh`.

    Raises:
        ValueError: for a layout that cannot run (see `check_layout`).
    """
    check_layout(parallel, precision)
    world = World.from_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed reads it however the process was started.
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    if world.size == 1:  # no port is opened, so that any number of runs fit on one host
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    return Mesh(world, device)


def close_mesh() -> None:
    """End process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_then_others(mesh: Mesh, work: Callable[[bool], T]) -> T:
    """`work(True)` on the first process, and only then `work(False)` on the others.

    Raises:
        ValueError: on every process where the first raised one.
    """
    result, error = None, None
    if mesh.is_first:
        try:
            result = work(True)
        except ValueError as raised:
            error = raised
    if mesh.any(error is not None):
        raise error or ValueError("the first process refused its input; it says why")
    return result if mesh.is_first else work(False)
