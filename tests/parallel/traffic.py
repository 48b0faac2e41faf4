"""What a rank sends, counted where torch hands tensors to a process group."""

from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends while the mode is on, by operation.

    A collective is counted as the algorithms that move least: an all-reduce of B bytes over n ranks sends 2·B·(n-1)/n,
    a gather of n pieces to B bytes and a reduce-scatter of B bytes send B·(n-1)/n, an all-to-all what is not its own.
    """

    def __init__(self):
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._opname
            count = _COUNTS.get(name)
            if count is not None:
                self.sent[name] += count(*args)
        return function(*args, **kwargs or {})


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(group: torch.ScriptObject) -> int:
    return dist.ProcessGroup.unbox(group).size()


def _all_reduce(tensors, group, *_) -> float:
    n = _size(group)
    return sum(map(_bytes, tensors)) * 2 * (n - 1) / n


def _all_gather(output, _, group, *__) -> float:
    n = _size(group)
    return _bytes(output) * (n - 1) / n


def _reduce_scatter(_, sent, group, *__) -> float:
    n = _size(group)
    return _bytes(sent) * (n - 1) / n


def _all_to_all(_, sent, group, __, sent_sizes, *___) -> float:
    group = dist.ProcessGroup.unbox(group)
    own = sent_sizes[group.rank()] if sent_sizes else sent.numel() // group.size()
    return (sent.numel() - own) * sent.element_size()


_COUNTS = {
    "allreduce_": _all_reduce,
    "_allgather_base_": _all_gather,
    "_reduce_scatter_base_": _reduce_scatter,
    "alltoall_base_": _all_to_all,
    "send": lambda tensors, *_: sum(map(_bytes, tensors)),
}
