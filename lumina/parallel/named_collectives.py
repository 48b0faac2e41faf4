"""Which axis of the mesh a collective is of: for those who look on while a rank talks to others."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.profiler import record_function

from lumina.parallel.mesh import Mesh, groups_of

AXIS = "lumina: communication of "
"""With the name of the axis: that of a stretch of the trace."""
WAIT = "wait"
_CALLS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "gather", "scatter"),
    *("all_gather_single", "all_to_all_single", "reduce_scatter_single", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base"),
    *("send", "recv", "barrier"),
)

Around = Callable[[str, str, tuple[Any, ...]], AbstractContextManager]
"""`around(axis, call, arguments)`: entered while a method of this name of torch's ProcessGroup is called with these
arguments, or a Work is waited for."""


@contextmanager
def watched_collectives(mesh: Mesh, around: Around) -> Iterator[None]:
    """Whatever this process hands to a process group, and waits for, passes through `around`."""
    groups = {name: group for name, group in groups_of(mesh).items() if dist.get_world_size(group) > 1}
    axis_of = {group.group_name: name for name, group in reversed(groups.items())}
    # DeepSpeed makes groups of its own; one of the ranks of an axis is taken for that axis.
    of_ranks = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}

    def axis_for(group: ProcessGroup) -> str:
        if group.group_name not in axis_of:
            axis_of[group.group_name] = of_ranks.get(tuple(dist.get_process_group_ranks(group)), "others")
        return axis_of[group.group_name]

    pending: dict[int, tuple[Work, str]] = {}
    # As they stand in the class: what an attribute gives would not be bound to an object when it is put back.
    originals = {name: ProcessGroup.__dict__[name] for name in _CALLS if name in ProcessGroup.__dict__}
    original_wait = Work.__dict__["wait"]
    wait = Work.wait

    def watched(method: str) -> Callable:
        original = getattr(ProcessGroup, method)

        def call(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
            axis = axis_for(group)
            if axis == "world" and method in ("send", "recv"):
                axis = "pipeline"  # DeepSpeed's stages write to each other over the world's group
            with around(axis, method, arguments):
                work = original(group, *arguments, **options)
            if isinstance(work, Work):
                pending[id(work)] = work, axis
            return work

        return call

    def watched_wait(work: Work, *arguments: Any, **options: Any) -> Any:
        _, axis = pending.pop(id(work), (work, "others"))
        with around(axis, WAIT, arguments):
            return wait(work, *arguments, **options)

    try:
        for name in originals:
            setattr(ProcessGroup, name, watched(name))
        Work.wait = watched_wait
        yield
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)
        Work.wait = original_wait


def named_collectives(mesh: Mesh) -> AbstractContextManager[None]:
    """Collectives, and waits for them, stand in a trace with the axis of the mesh that they are of."""
    return watched_collectives(mesh, lambda axis, *_: record_function(AXIS + axis))
