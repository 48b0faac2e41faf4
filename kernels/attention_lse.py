"""Attention between a block of queries and a block of keys, as one part of a larger softmax.

The forward pass gives the log-sum-exp (lse) of each row's scores beside its output, so that blocks merge exactly. The
backward pass takes the output and lse of the whole attention, merged over blocks, and gives this block's part of the
gradients (arXiv 2310.01889).

Shape suffixes: q query row, k key row, h head, e element of a head; within a backend b meeting, m query, n key.
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Meeting(NamedTuple):
    """Query rows [q_start, q_stop) see key rows [k_start, k_stop)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


Meetings = tuple[Meeting, ...]
"""No row of the queries is in two of them, nor one of the keys; either side may be empty."""

_Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """The meetings of one call of a kernel: where their rows lie, neighbours joined, and how many each has."""

    q_rows: _Ranges
    k_rows: _Ranges
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]


class LseBackend(ABC):
    """One kernel for attention with lse. What all share is here: which rows, and grouped heads.

    As every query sees every key of its meeting, the query heads of a key head are as good as further query rows: they
    are folded into rows, K and V are not repeated, and dK and dV sum over the heads by themselves.
    """

    name: ClassVar[str]
    equal_lengths: ClassVar[bool]
    """Whether the meetings of one call must have the same numbers of rows."""

    @abstractmethod
    def usable(self, q_qhe: Tensor) -> bool:
        """Whether it can run on such queries (device, dtype and E are looked at, the number of rows is not)."""

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """(out (Q, H, E), lse (Q, H)) of rows that all meet, as many heads in k and v as in q; none is empty."""

    @abstractmethod
    def _backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), shaped as q, k and v."""

    def forward(self, q_qhe: Tensor, k_khe: Tensor, v_khe: Tensor, meetings: Meetings) -> tuple[Tensor, Tensor]:
        """``softmax(q·kᵀ / sqrt(E))·v``, not causal, and the lse of the scaled scores.

        Shapes: q (Q, heads, E); k, v (K, kv_heads, E) with heads a multiple of kv_heads. Returns out (Q, heads, E) in
        the dtype of q or fp32, and lse (Q, heads) in fp32 (float64 for float64). A row that meets nothing has 0 and -∞.
        """
        kv_heads = k_khe.shape[1]
        repeats = q_qhe.shape[1] // kv_heads
        q = _fold(q_qhe, kv_heads)
        parts = _parts(meetings, repeats, self.equal_lengths)
        blocks = [
            self._forward(_take(q, part.q_rows), _take(k_khe, part.k_rows), _take(v_khe, part.k_rows), part)
            for part in parts
        ]
        rows = [part.q_rows for part in parts]
        out = _put([out for out, _ in blocks], rows, q, 0.0, q.dtype)
        lse = _put([lse for _, lse in blocks], rows, q[..., 0], -math.inf, sum_dtype(q.dtype))
        return _unfold(out, repeats), _unfold(lse, repeats)

    def backward(
        self,
        grad_out_qhe: Tensor,
        q_qhe: Tensor,
        k_khe: Tensor,
        v_khe: Tensor,
        out_qhe: Tensor,
        lse_qh: Tensor,
        meetings: Meetings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) through these meetings; `out_qhe` and `lse_qh` are those of the whole attention."""
        kv_heads = k_khe.shape[1]
        repeats = q_qhe.shape[1] // kv_heads
        grad_out, q, out, lse = (_fold(x, kv_heads) for x in (grad_out_qhe, q_qhe, out_qhe, lse_qh))
        parts = _parts(meetings, repeats, self.equal_lengths)
        gradients = [
            self._backward(
                _take(grad_out, part.q_rows),
                _take(q, part.q_rows),
                _take(k_khe, part.k_rows),
                _take(v_khe, part.k_rows),
                _take(out, part.q_rows),
                _take(lse, part.q_rows),
                part,
            )
            for part in parts
        ]
        dq, dk, dv = ([of[i] for of in gradients] for i in range(3))
        q_rows, k_rows = [part.q_rows for part in parts], [part.k_rows for part in parts]
        return (
            _unfold(_put(dq, q_rows, q, 0.0, q.dtype), repeats),
            _put(dk, k_rows, k_khe, 0.0, k_khe.dtype),
            _put(dv, k_rows, v_khe, 0.0, v_khe.dtype),
        )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=1024)
def _parts(meetings: Meetings, repeats: int, equal_lengths: bool) -> tuple[Part, ...]:
    """The calls that these meetings take, each query row being `repeats` rows."""
    calls: dict[tuple[int, int] | None, list[Meeting]] = {}
    for meeting in meetings:
        q_start, q_stop, k_start, k_stop = meeting
        if q_start < q_stop and k_start < k_stop:  # torch's CPU kernel kills the process on an empty side
            lengths = (q_stop - q_start, k_stop - k_start) if equal_lengths else None
            calls.setdefault(lengths, []).append(Meeting(q_start * repeats, q_stop * repeats, k_start, k_stop))
    return tuple(
        Part(
            q_rows=_joined([(m.q_start, m.q_stop) for m in members]),
            k_rows=_joined([(m.k_start, m.k_stop) for m in members]),
            q_lengths=tuple(m.q_stop - m.q_start for m in members),
            k_lengths=tuple(m.k_stop - m.k_start for m in members),
        )
        for members in calls.values()
    )


def _joined(ranges: list[tuple[int, int]]) -> _Ranges:
    joined = ranges[:1]
    for start, stop in ranges[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _take(x: Tensor, ranges: _Ranges) -> Tensor:
    return torch.cat([x[start:stop] for start, stop in ranges]) if len(ranges) > 1 else x[slice(*ranges[0])]


def _put(blocks: list[Tensor], rows: list[_Ranges], like: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    """Each block's rows at their place in a tensor shaped as `like`, filled elsewhere; `dtype` is for no block."""
    if len(blocks) == 1 and rows[0] == ((0, len(like)),):
        return blocks[0]
    whole = torch.full(like.shape, fill, dtype=blocks[0].dtype if blocks else dtype, device=like.device)
    for block, ranges in zip(blocks, rows, strict=True):
        pieces = block.split([stop - start for start, stop in ranges])
        for (start, stop), piece in zip(ranges, pieces, strict=True):
            whole[start:stop] = piece
    return whole


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(Q, kv_heads·R, …) to (Q·R, kv_heads, …)."""
    if x.shape[1] == kv_heads:
        return x
    return x.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return x
    return x.unflatten(0, (len(x) // repeats, repeats)).transpose(1, 2).flatten(1, 2)
