"""Differentiable collectives over one mesh axis, each with the collective that is its adjoint.

Megatron-core's own (tensor_parallel.mappings) want equal stretches of tokens and a CUDA device, and reduce gradients in
place that autograd may have handed to others too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.parallel.cuts import bounds
from lumina.parallel.mesh import Axis


def spread(x: Tensor, axis: Axis) -> Tensor:
    """The same values on every rank, each of which uses them in its own way: gradients are summed."""
    return _Spread.apply(x, axis) if axis.size > 1 else x


def sum_partial(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, on every rank: gradients are the same on all and pass through."""
    return _SumPartial.apply(x, axis) if axis.size > 1 else x


def gather_tokens(x_td: Tensor, axis: Axis, total: int) -> Tensor:
    """The stretches of all ranks, cut by `bounds(total, size)`, on every rank: gradients are summed and cut again."""
    return _GatherTokens.apply(x_td, axis, total) if axis.size > 1 else x_td


def scatter_sum_tokens(x_td: Tensor, axis: Axis) -> Tensor:
    """This rank's stretch of the sum over ranks: the adjoint of `gather_tokens`."""
    return _ScatterSumTokens.apply(x_td, axis) if axis.size > 1 else x_td


def gather_columns(x_nd: Tensor, axis: Axis, *, partial_gradients: bool) -> Tensor:
    """The equal slices (N, D/size) of all ranks side by side.

    Args:
        partial_gradients: whether each rank has a part of the gradient of the whole, to be summed, or all of it.
    """
    return _GatherColumns.apply(x_nd, axis, partial_gradients) if axis.size > 1 else x_nd


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Tensors of one shape from all ranks, along a new first dim."""
    gathered = x.new_empty((axis.size, *x.shape))
    dist.all_gather_into_tensor(gathered.view(axis.size * x.shape[0], *x.shape[1:]), x.contiguous(), group=axis.group)
    return gathered


def all_reduced(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, in a tensor of its own."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _gathered_tokens(x_td: Tensor, axis: Axis, total: int) -> Tensor:
    cuts = bounds(total, axis.size)
    longest = -(-total // axis.size)  # the collective takes equal lengths, of which ours may fall short by one
    padded = x_td.new_zeros(longest, *x_td.shape[1:])
    padded[: len(x_td)] = x_td
    gathered = all_gather(padded, axis)
    return torch.cat([gathered[r, : cuts[r + 1] - cuts[r]] for r in range(axis.size)])


def _scattered_sum(x_td: Tensor, axis: Axis) -> Tensor:
    cuts = bounds(len(x_td), axis.size)
    longest = -(-len(x_td) // axis.size)
    padded = x_td.new_zeros(axis.size, longest, *x_td.shape[1:])
    for rank in range(axis.size):
        padded[rank, : cuts[rank + 1] - cuts[rank]] = x_td[cuts[rank] : cuts[rank + 1]]
    mine = x_td.new_empty(longest, *x_td.shape[1:])
    dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), group=axis.group)
    return mine[: cuts[axis.rank + 1] - cuts[axis.rank]]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grad, ctx.axis), None


class _SumPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, axis: Axis, total: int) -> Tensor:
        ctx.axis = axis
        return _gathered_tokens(x_td, axis, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered_sum(grad, ctx.axis), None, None


class _ScatterSumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.total = axis, len(x_td)
        return _scattered_sum(x_td, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered_tokens(grad, ctx.axis, ctx.total), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, axis: Axis, partial_gradients: bool) -> Tensor:
        ctx.axis, ctx.partial_gradients = axis, partial_gradients
        return torch.cat(tuple(all_gather(x_nd, axis)), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = all_reduced(grad, ctx.axis) if ctx.partial_gradients else grad
        return whole.chunk(ctx.axis.size, dim=-1)[ctx.axis.rank].contiguous(), None, None
