"""What a rank hands to the network in a run, real or simulated, in the planner's words."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from lumina.parallel.mesh import Mesh
from lumina.parallel.named_collectives import WAIT, watched_collectives
from lumina.planner.messages import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    BROADCAST,
    RECEIVE,
    REDUCE,
    REDUCE_SCATTER,
    SEND,
    Message,
    Messages,
)


def nbytes(tensors: Tensor | list) -> int:
    """Of a tensor, or of all tensors of a list of them or of lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(nbytes, tensors))


def _first(arguments: tuple[Any, ...]) -> int:
    return nbytes(arguments[0])


def _second(arguments: tuple[Any, ...]) -> int:
    return nbytes(arguments[1])


# By the method of torch's ProcessGroup: outputs come before inputs there. Several names for one, of several versions.
_WORDS: dict[str, tuple[str, Callable[[tuple[Any, ...]], int]]] = {
    "allreduce": (ALL_REDUCE, _first),
    "allreduce_coalesced": (ALL_REDUCE, _first),
    "allgather": (ALL_GATHER, _first),
    "_allgather_base": (ALL_GATHER, _first),
    "all_gather_single": (ALL_GATHER, _first),
    "allgather_into_tensor_coalesced": (ALL_GATHER, _first),
    "reduce_scatter": (REDUCE_SCATTER, _second),
    "_reduce_scatter_base": (REDUCE_SCATTER, _second),
    "reduce_scatter_single": (REDUCE_SCATTER, _second),
    "reduce_scatter_tensor_coalesced": (REDUCE_SCATTER, _second),
    "alltoall": (ALL_TO_ALL, _second),
    "alltoall_base": (ALL_TO_ALL, _second),
    "all_to_all_single": (ALL_TO_ALL, _second),
    "broadcast": (BROADCAST, _first),
    "reduce": (REDUCE, _first),
    "send": (SEND, _first),
    "recv": (RECEIVE, _first),
}
_UNCOUNTED = ("gather", "scatter", "barrier", WAIT)
"""Small objects before and after a run; no step takes them."""


@contextmanager
def recorded_messages(mesh: Mesh) -> Iterator[Messages]:
    """The messages of this rank from here on, filled as they are handed in; complete when the context is left."""
    messages = Messages()

    def note(axis: str, call: str, arguments: tuple[Any, ...]) -> AbstractContextManager:
        if call not in _UNCOUNTED:
            operation, size = _WORDS[call]
            messages[Message(axis, operation, size(arguments))] += 1
        return nullcontext()

    with watched_collectives(mesh, note):
        yield messages
