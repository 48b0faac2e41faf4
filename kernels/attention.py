"""Attention over a packed sequence: the queries of a sample meet the keys of the same sample alone."""

import functools
import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_lse import LseBackend, Meeting, Meetings
from .attention_lse_backends import PACKED
from .dispatch import Operation


@dataclass(eq=False)
class AttentionPlan:
    """Which tokens meet: sample i has `query_lengths[i]` queries and `key_lengths[i]` keys, packed one after another.

    Built once for a pack and used by every layer; what a backend derives from the lengths is kept here.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    device: torch.device

    @functools.cached_property
    def cu_queries(self) -> Tensor:
        """(N+1,) int32, where each sample's queries start."""
        return _offsets(self.query_lengths, self.device)

    @functools.cached_property
    def cu_keys(self) -> Tensor:
        """(N+1,) int32, where each sample's keys start."""
        return _offsets(self.key_lengths, self.device)

    @functools.cached_property
    def meetings(self) -> Meetings:
        """Where each sample's queries and keys are."""
        starts = (pairwise((0, *accumulate(lengths))) for lengths in (self.query_lengths, self.key_lengths))
        return tuple(Meeting(*queries, *keys) for queries, keys in zip(*starts, strict=True))

    @functools.cached_property
    def groups(self) -> list["_Group"]:
        """Samples with the same number of queries, which one batched call can take."""
        members: dict[int, list[int]] = {}
        for sample, length in enumerate(self.query_lengths):
            members.setdefault(length, []).append(sample)
        return [self._group(samples) for length, samples in members.items() if length > 0]

    @functools.cached_property
    def ungrouped(self) -> Tensor:
        """(T,), where in the concatenated groups each query of the pack is."""
        return torch.cat([group.queries for group in self.groups]).argsort()

    def _group(self, samples: list[int]) -> "_Group":
        # From the lengths, not from tensors: what is on a device would have to be waited for.
        query_starts, key_starts = ((0, *accumulate(x)) for x in (self.query_lengths, self.key_lengths))
        key_lengths = [self.key_lengths[sample] for sample in samples]
        longest = max(key_lengths)
        queries = torch.tensor([query_starts[sample] for sample in samples])[:, None] + torch.arange(
            self.query_lengths[samples[0]]
        )
        # A short caption is filled up with its own first keys; the mask takes them out again.
        steps = torch.arange(longest)
        inside = steps < torch.tensor(key_lengths)[:, None]
        keys = torch.tensor([key_starts[sample] for sample in samples])[:, None] + torch.where(inside, steps, 0)
        return _Group(
            size=len(samples),
            queries=queries.flatten().to(self.device),
            keys=keys.flatten().to(self.device),
            mask=None if min(key_lengths) == longest else inside[:, None, None].to(self.device),
        )


@dataclass(eq=False)
class _Group:
    size: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)


@Operation
def attention(q_thd: Tensor, k_shd: Tensor, v_shd: Tensor, plan: AttentionPlan) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D))·v`` within each sample of a pack, not causal.

    Shapes: q (T, heads, D); k, v (S, kv_heads, D) with heads a multiple of kv_heads; returns (T, heads, D).
    """
    repeats = q_thd.shape[1] // k_shd.shape[1]
    k = k_shd.repeat_interleave(repeats, dim=1)
    v = v_shd.repeat_interleave(repeats, dim=1)
    queries, keys, values = (
        torch.split(x, list(lengths))
        for x, lengths in ((q_thd, plan.query_lengths), (k, plan.key_lengths), (v, plan.key_lengths))
    )
    outputs = [q_thd[:0].float()]
    for q_i, k_i, v_i in zip(queries, keys, values, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_i.float(), k_i.float()) / math.sqrt(q_i.shape[-1])
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_i.float()))
    return torch.cat(outputs).to(q_thd.dtype)


class _WithLse(torch.autograd.Function):
    """A backend's forward pass, and its backward pass from the log-sum-exp that the forward pass kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: LseBackend, meetings: Meetings) -> Tensor:
        out, lse = backend.forward(q, k, v, meetings)
        out = out.to(q.dtype)
        ctx.backend, ctx.meetings = backend, meetings
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation gives them a single time
        q, k, v = saved[:3]
        grads = ctx.backend.backward(grad_out, *saved, ctx.meetings)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None


def with_lse(backend: LseBackend, q_thd: Tensor, k_shd: Tensor, v_shd: Tensor, plan: AttentionPlan) -> Tensor:
    """Through one of the backends that ring attention has, so that both run on the same kernels."""
    return _WithLse.apply(q_thd, k_shd, v_shd, backend, plan.meetings)


for _backend in PACKED:  # those preferred first
    attention.implementation(_backend.name, usable=_backend.usable)(functools.partial(with_lse, _backend))


@attention.implementation("sdpa", usable=lambda q: True)
def sdpa(q_thd: Tensor, k_shd: Tensor, v_shd: Tensor, plan: AttentionPlan) -> Tensor:
    """torch's scaled_dot_product_attention, one call for all samples of equal length."""
    groups = plan.groups
    if not groups:  # a stretch of no tokens: keys and values get the gradient zero, not none
        return q_thd + 0.0 * (k_shd.sum() + v_shd.sum())
    if len(groups) == 1:  # the whole pack, in order: nothing to gather but unequal captions
        return _sdpa_group(q_thd, k_shd, v_shd, groups[0])
    outputs = [_sdpa_group(q_thd[group.queries], k_shd, v_shd, group) for group in groups]
    return torch.cat(outputs)[plan.ungrouped]


def _sdpa_group(q: Tensor, k_shd: Tensor, v_shd: Tensor, group: _Group) -> Tensor:
    whole = group.mask is None and len(group.keys) == len(k_shd)
    k, v = (k_shd, v_shd) if whole else (k_shd[group.keys], v_shd[group.keys])
    q, k, v = (x.unflatten(0, (group.size, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, group.mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)
