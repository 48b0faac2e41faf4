"""Tokens for heads: the all-to-all of DeepSpeed-Ulysses (arXiv 2309.14509), for any numbers of tokens and heads.

Each rank of an axis has a stretch of tokens with all heads; attention wants all tokens with some heads.

Shape suffixes: t token of this rank's stretch, s token of the axis's stretch, h head, e element of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from lumina.parallel.cuts import kv_head_counts
from lumina.parallel.mesh import Axis


def split_heads(
    q_the: Float[Tensor, "t h e"],
    k_the: Float[Tensor, "t kv e"],
    v_the: Float[Tensor, "t kv e"],
    tokens: tuple[int, ...],
    axis: Axis,
) -> tuple[Float[Tensor, "s h_here e"], Float[Tensor, "s kv_here e"], Float[Tensor, "s kv_here e"]]:
    """This rank's heads of the tokens of all ranks, of which rank i has `tokens[i]`; all three in one message."""
    kv_heads = k_the.shape[1]
    kv = kv_head_counts(kv_heads, axis.size)
    queries = _query_counts(kv, q_the.shape[1] // kv_heads)
    return _AllToAll.apply(True, tokens, (queries, kv, kv), axis, q_the, k_the, v_the)


def join_heads(
    out_she: Float[Tensor, "s h_here e"], tokens: tuple[int, ...], kv_heads: int, heads: int, axis: Axis
) -> Float[Tensor, "t h e"]:
    """All heads of this rank's tokens: undoes `split_heads` for what attention gives."""
    counts = _query_counts(kv_head_counts(kv_heads, axis.size), heads // kv_heads)
    return _AllToAll.apply(False, tokens, (counts,), axis, out_she)[0]


def _query_counts(kv: tuple[int, ...], repeats: int) -> tuple[int, ...]:
    return tuple(count * repeats for count in kv)


class _AllToAll(torch.autograd.Function):
    """Splits or joins the heads of several tensors at once; each is the other's adjoint."""

    @staticmethod
    def forward(
        ctx: Any, split: bool, tokens: tuple[int, ...], heads: tuple[tuple[int, ...], ...], axis: Axis, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.split, ctx.arguments = split, (tokens, heads, axis)
        return (_split if split else _join)(parts, tokens, heads, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(_join if ctx.split else _split)(gradients, *ctx.arguments)


def _split(
    parts: tuple[Tensor, ...], tokens: tuple[int, ...], heads: tuple[tuple[int, ...], ...], axis: Axis
) -> tuple[Tensor, ...]:
    """From (t, all heads, e) to (s, heads of this rank, e); `heads[p][rank]` are those of part p."""
    own, head_dim = tokens[axis.rank], parts[0].shape[-1]
    widths = [sum(counts) for counts in zip(*heads, strict=True)]
    sent_sizes = [own * width * head_dim for width in widths]
    sent = parts[0].new_empty(sum(sent_sizes))
    pieces = [part.split(counts, dim=1) for part, counts in zip(parts, heads, strict=True)]
    for rank, piece in enumerate(sent.split(sent_sizes)):
        torch.cat([of[rank] for of in pieces], dim=1, out=piece.view(own, widths[rank], head_dim))
    received = sent.new_empty(sum(tokens), widths[axis.rank], head_dim)
    received_sizes = [count * widths[axis.rank] * head_dim for count in tokens]
    dist.all_to_all_single(received.view(-1), sent, received_sizes, sent_sizes, group=axis.group)
    return received.split([counts[axis.rank] for counts in heads], dim=1)


def _join(
    parts: tuple[Tensor, ...], tokens: tuple[int, ...], heads: tuple[tuple[int, ...], ...], axis: Axis
) -> tuple[Tensor, ...]:
    """From (s, heads of this rank, e) to (t, all heads, e)."""
    own, head_dim = tokens[axis.rank], parts[0].shape[-1]
    widths = [sum(counts) for counts in zip(*heads, strict=True)]
    sent = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
    sent_sizes = [count * widths[axis.rank] * head_dim for count in tokens]
    received_sizes = [own * width * head_dim for width in widths]
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent.view(-1), received_sizes, sent_sizes, group=axis.group)
    pieces = []  # of each rank, its heads of each part
    for rank, piece in enumerate(received.split(received_sizes)):
        pieces.append(piece.view(own, widths[rank], head_dim).split([counts[rank] for counts in heads], dim=1))
    return tuple(torch.cat(of, dim=1) for of in zip(*pieces, strict=True))
