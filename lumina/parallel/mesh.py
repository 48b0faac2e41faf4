"""Which process is which: the world as the launcher describes it, and the mesh axes laid over it.

World rank = ((pipeline · data + data rank) · ring + ring rank) · ulysses + …, tensor innermost: the order of
megatron-core's ``tp-cp-ep-dp-pp`` and of DeepSpeed's (pipe, data, model), where DeepSpeed's data is our
data × ring × ulysses. Neighbours on the tensor and Ulysses axes, which talk most, share a host.
"""

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.config.schema import ParallelConfig
from lumina.parallel.activity import Activity
from lumina.parallel.network import Way, find_way, set_interfaces

# How each launcher tells a process its rank, the world size and the rank on its host.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
)
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, mpirun
_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size).

    local_size: ranks on this host; None where the launcher does not tell.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None = None

    @staticmethod
    def from_environment() -> "World":
        """One process unless a launcher says otherwise.

        Raises:
            ValueError: where a launcher sets a part of what is needed, or nothing tells where rank 0 listens.
        """
        for rank, size, local_rank in _LAUNCHERS:
            if rank not in os.environ or size not in os.environ:
                continue
            own, count = int(os.environ[rank]), int(os.environ[size])
            world = World(own, count, int(os.environ.get(local_rank, "0")), _local_size(rank, count))
            if world.size > 1 and ("MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ):
                raise ValueError(
                    f"{size}={world.size} but MASTER_ADDR and MASTER_PORT are not set; "
                    "set them to a host and free port of rank 0, or launch with torchrun or deepspeed"
                )
            return world
        return World(0, 1, 0)


def _local_size(launcher: str, size: int) -> int | None:
    if launcher.startswith("SLURM_"):  # it tells how many tasks each node has in a form of its own
        return size if os.environ.get("SLURM_STEP_NUM_NODES") == "1" else None
    return next((int(os.environ[name]) for name in _LOCAL_SIZES if name in os.environ), None)


def device_of(world: World) -> torch.device:
    """This process's GPU, or the CPU where there is none.

    A launcher may show each rank its own GPU alone; that one has number 0 whatever the rank's number on the host.

    Raises:
        ValueError: where this host has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_rank >= count > 1:
        raise ValueError(
            f"rank {world.rank} is number {world.local_rank} on {socket.gethostname()}, counted from 0, but that has "
            f"{count} GPUs, and two ranks that share one would hang: start at most {count} ranks on this host"
        )
    return torch.device("cuda", 0 if count == 1 else world.local_rank)


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of the mesh as this process sees it: the ranks that differ from it along this axis alone."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """World ranks in the order of the axis."""

    @staticmethod
    def of(group: dist.ProcessGroup) -> "Axis":
        ranks = tuple(dist.get_process_group_ranks(group))
        return Axis(len(ranks), ranks.index(dist.get_rank()), group, ranks)


@dataclass(frozen=True, eq=False)
class Mesh:
    """The axes, and this process's place on each. Passed to whoever needs it; there is no global one.

    data: replicas, each with packs of its own. pipeline: stretches of the blocks. ring, ulysses: stretches of a pack.
    tensor: slices of the weights, and, under `sequence_parallel`, of the tokens between two sharded products.
    gradient: data × ring × ulysses, over which gradients are summed and ZeRO shards.
    weights: tensor × pipeline, the ranks that hold one copy of the weights together.
    replica: pipeline × ring × ulysses × tensor, the ranks that work on the same packs; the first leads it.
    """

    world: World
    device: torch.device
    data: Axis = Axis()
    pipeline: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    tensor: Axis = Axis()
    gradient: Axis = Axis()
    weights: Axis = Axis()
    replica: Axis = Axis()
    sequence_parallel: bool = False
    way: Way | None = None
    """To the host of rank 0; None for a single process."""
    activity: Activity = field(default_factory=Activity)
    """What this process is at; the watchdog reads it."""

    @property
    def leads_replica(self) -> bool:
        """Whether this process speaks for those that work on the same packs."""
        return not (self.pipeline.rank or self.ring.rank or self.ulysses.rank or self.tensor.rank)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and writes what all ranks share."""
        return self.world.rank == 0

    def sum(self, values: Sequence[float | int]) -> list[float]:
        """Elementwise sum over all processes, in float64."""
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

    def from_first(self, value: T | None) -> T:
        """What the first process gives, on all; small and picklable."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_leader(self, value: T | None) -> T:
        """What the leader of this replica gives, on all its ranks; small and picklable."""
        if self.replica.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.replica.ranks[0], group=self.replica.group)
        return box[0]

    def tensor_from_leader(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of the leader of this replica, on all its ranks, where it may be elsewhere."""
        if self.replica.size == 1:
            return tensor
        received = torch.empty(shape, dtype=dtype, device=self.device) if tensor is None else tensor.contiguous()
        if received.numel():
            dist.broadcast(received, src=self.replica.ranks[0], group=self.replica.group)
        return received

    def sum_to_first(self, tensor: Tensor) -> None:
        """In place: on the first process the sum over all; what it holds elsewhere is left undefined."""
        dist.reduce(tensor, dst=0)

    def largest(self, value: float | int) -> float:
        """Of the values of all processes, in float64."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def barrier(self) -> None:
        self.sum([0.0])


def open_mesh(parallel: ParallelConfig, store: dist.Store | None = None) -> Mesh:
    """Start process groups: nccl where each rank has a GPU, gloo elsewhere. Close with `close_mesh`.

    The layout is one that `layout.check_layout` has let pass. Where the ranks are on several hosts and nobody has said
    which network to take, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set.

    Args:
        store: by which ranks find each other, with nothing in it; None: the one that the launcher tells of.

    Raises:
        ValueError: where there are more ranks than GPUs, or no way leads to rank 0 (`network.find_way`).
    """
    world = World.from_environment()
    device = device_of(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed takes it for the number of the device, however the process was started.
    os.environ["LOCAL_RANK"] = str(world.local_rank if device.index is None else device.index)
    if world.size == 1:  # no port is opened, so that any number of runs fit on one host
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Mesh(world, device)
    way = find_way(os.environ["MASTER_ADDR"], world.local_size == world.size, os.environ)
    if world.local_size != world.size:
        set_interfaces(way, os.environ)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    return _with_groups(parallel, world, device, way)


def _with_groups(parallel: ParallelConfig, world: World, device: torch.device, way: Way | None) -> Mesh:
    groups = _parallel_state()
    sequence_ranks = parallel.ring * parallel.ulysses
    groups.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=sequence_ranks,
        hierarchical_context_parallel_sizes=[parallel.ulysses, parallel.ring] if sequence_ranks > 1 else None,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    ulysses, ring = Axis(ranks=(world.rank,)), Axis(ranks=(world.rank,))
    if sequence_ranks > 1:
        ulysses, ring = map(Axis.of, groups.get_hierarchical_context_parallel_groups())
    if device.type == "cuda" and ring.size > 1:
        # NCCL wants all ranks of a group in its first exchange; in a ring, one without tokens would send nothing.
        dist.all_reduce(torch.zeros(1, device=device), group=ring.group)
    return Mesh(
        world,
        device,
        way=way,
        replica=_replica(parallel, world),
        data=Axis.of(groups.get_data_parallel_group()),
        pipeline=Axis.of(groups.get_pipeline_model_parallel_group()),
        ring=ring,
        ulysses=ulysses,
        tensor=Axis.of(groups.get_tensor_model_parallel_group()),
        gradient=Axis.of(groups.get_data_parallel_group(with_context_parallel=True)),
        weights=Axis.of(groups.get_model_parallel_group()),
        sequence_parallel=parallel.sequence,
    )


def _replica(parallel: ParallelConfig, world: World) -> Axis:
    size = parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses
    if size == 1:
        return Axis(ranks=(world.rank,))
    inner, replicas = size // parallel.pipeline, world.size // size
    ranks = [[r for r in range(world.size) if r // inner % replicas == replica] for replica in range(replicas)]
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=_TIMEOUT)
    return Axis.of(group)


def close_mesh(mesh: Mesh) -> None:
    """End process groups; those of torch may have ended with an engine."""
    if mesh.world.size > 1:
        _parallel_state().destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _parallel_state():
    # Seconds to import, and of no use to a single process. It warns of apex, Transformer Engine and other things that
    # it would rather have.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    return parallel_state


def groups_of(mesh: Mesh) -> dict[str, dist.ProcessGroup]:
    """The process groups that are in use, by the name of their axis."""
    axes = ("data", "pipeline", "ring", "ulysses", "tensor", "gradient", "weights", "replica")
    groups = {name: getattr(mesh, name).group for name in axes}
    return {"world": dist.group.WORLD} | {name: group for name, group in groups.items() if group is not None}


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
