"""Indexing of fake CUDA tensors where torch is built without CUDA."""

from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Item = int | slice | EllipsisType | Tensor | None


class GuardlessIndexing(TorchFunctionMode):
    """Square brackets by torch's operations: the brackets' own code asks for the device, which such a build refuses
    though nothing is to be done there."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.__getitem__:
            return _get(*args)
        if function is Tensor.__setitem__:
            return _set(*args)
        return function(*args, **kwargs or {})


def _get(x: Tensor, index: Any) -> Tensor:
    view, indices = _viewed(x, index)
    return torch.ops.aten.index(view, indices) if indices else view


def _set(x: Tensor, index: Any, value: Tensor | float) -> None:
    view, indices = _viewed(x, index)
    if indices:
        value = value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)
        torch.ops.aten.index_put_(view, indices, value)
    elif isinstance(value, Tensor):
        view.copy_(value)
    else:
        view.fill_(value)


def _viewed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What all but tensors of an index select, as a view, and the tensors, None before them for each dim without."""
    items: tuple[_Item, ...] = index if isinstance(index, tuple) else (index,)
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    view, dim, indices = torch.ops.aten.alias(x), 0, []
    for item in items:
        if item is None:
            view = view.unsqueeze(dim)
        elif item is Ellipsis:
            dim += x.dim() - consumed
            continue
        elif isinstance(item, slice):
            view = torch.ops.aten.slice(view, dim, item.start, item.stop, 1 if item.step is None else item.step)
        elif isinstance(item, Tensor):
            indices += [None] * (dim - len(indices)) + [item]
        else:
            view = view.select(dim, item)
            continue
        dim += 1
    return view, indices
