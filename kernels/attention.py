"""Attention over a packed sequence: the queries of a sample meet the keys of the same sample alone."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Operation
from .optional import flash_attn


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
        query_starts, key_starts = self.cu_queries.tolist(), self.cu_keys.tolist()
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
            mask=None if bool(inside.all()) else inside[:, None, None].to(self.device),
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


def _flash_attn_usable(q: Tensor) -> bool:
    return q.is_cuda and len(q) > 0 and q.dtype in (torch.bfloat16, torch.float16) and flash_attn() is not None


@attention.implementation("flash_attn", usable=_flash_attn_usable)
def flash_attn_varlen(q_thd: Tensor, k_shd: Tensor, v_shd: Tensor, plan: AttentionPlan) -> Tensor:
    """flash-attn's packed kernel (arXiv 2307.08691)."""
    return flash_attn().flash_attn_varlen_func(
        q_thd,
        k_shd,
        v_shd,
        plan.cu_queries,
        plan.cu_keys,
        max(plan.query_lengths),
        max(plan.key_lengths),
    )


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
