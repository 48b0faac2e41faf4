"""What a rank hands to the network: the words in which plans, simulations and real runs are compared."""

from collections import Counter
from dataclasses import dataclass

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, SEND, RECEIVE, BROADCAST, REDUCE = "all-to-all", "send", "receive", "broadcast", "reduce"


@dataclass(frozen=True, order=True)
class Message:
    """One call of one rank.

    axis: of the mesh; "world" for all ranks.
    bytes: of an all-reduce, broadcast, reduce, send or receive the tensor; of an all-gather what comes out, of a
        reduce-scatter what goes in; of an all-to-all what goes in, one's own part with it.
    """

    axis: str
    operation: str
    bytes: int


Messages = Counter[Message]
"""How often each is handed in."""


def total_bytes(messages: Messages) -> int:
    """Of all calls together, counted as `Message.bytes` is."""
    return sum(message.bytes * count for message, count in messages.items())
