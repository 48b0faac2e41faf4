"""Merging two parts of one softmax, as a ring's steps give them (arXiv 2310.01889)."""

import math

import torch
from torch import Tensor

from . import triton_support
from .checks import expect
from .dispatch import Operation
from .registration import fused
from .triton_support import block_of, jit, tl

_ELEMENTS = 2048


@jit
def merge_attention_in_place(
    out_ptr,
    lse_ptr,
    block_out_ptr,
    block_lse_ptr,
    rows,
    heads,
    out_stride,
    out_head_stride,
    lse_stride,
    lse_head_stride,
    block_out_stride,
    block_out_head_stride,
    block_lse_stride,
    block_lse_head_stride,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    query, head = row // heads, row % heads
    elements = tl.arange(0, BLOCK)
    inside = there[:, None] & (elements < HEAD)[None, :]
    lse_at = lse_ptr + query * lse_stride + head * lse_head_stride
    block_lse_at = block_lse_ptr + query * block_lse_stride + head * block_lse_head_stride
    lse = tl.load(lse_at, mask=there, other=0.0).to(tl.float32)
    block_lse = tl.load(block_lse_at, mask=there, other=0.0).to(tl.float32)
    # From the difference alone, so that the weights sum to 1 however lse is rounded. Without keys (-∞) there is none.
    far = tl.abs(block_lse - lse)
    small = tl.exp(-far)
    weight = tl.where(block_lse > lse, 1.0, small) / (1.0 + small)
    weight = tl.where(block_lse == float("-inf"), 0.0, weight)[:, None]
    merged = tl.maximum(lse, block_lse) + tl.log(1.0 + small)
    merged = tl.where(block_lse == float("-inf"), lse, merged)
    out_at = out_ptr + (query * out_stride + head * out_head_stride)[:, None] + elements[None, :]
    block_out_at = (
        block_out_ptr + (query * block_out_stride + head * block_out_head_stride)[:, None] + elements[None, :]
    )
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    block_out = tl.load(block_out_at, mask=inside, other=0.0).to(tl.float32)
    change = block_out - out
    out = tl.where(weight < 0.5, out + weight * change, block_out - (1.0 - weight) * change)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_at, merged.to(lse_ptr.dtype.element_ty), mask=there)


def _check(out_qhe: Tensor, lse_qh: Tensor, block_out_qhe: Tensor, block_lse_qh: Tensor) -> None:
    expect("block_out", block_out_qhe, tuple(out_qhe.shape))
    expect("lse", lse_qh, tuple(out_qhe.shape[:2]))
    expect("block_lse", block_lse_qh, tuple(out_qhe.shape[:2]))


@Operation.checked(_check)
def merge_attention(out_qhe: Tensor, lse_qh: Tensor, block_out_qhe: Tensor, block_lse_qh: Tensor) -> None:
    """In place: (out, lse) of the keys seen so far becomes that with a further block's keys.

    out is to be fp32, or the merges' roundings add up; the block's may be narrower. A row without keys has lse -∞.
    """
    # The weights come from the difference alone, so that they sum to 1 however lse is rounded. -∞ (no keys) on both
    # sides would be NaN; one that comes from the data must stay.
    weight_qh = torch.sigmoid(block_lse_qh - lse_qh).masked_fill_(block_lse_qh == -math.inf, 0.0)
    out_qhe.lerp_(block_out_qhe.to(out_qhe.dtype), weight_qh[..., None])
    torch.logaddexp(lse_qh, block_lse_qh, out=lse_qh)


def _triton(out_qhe: Tensor, lse_qh: Tensor, block_out_qhe: Tensor, block_lse_qh: Tensor) -> None:
    queries, heads, head_dim = out_qhe.shape
    if out_qhe.numel() == 0:
        return
    if out_qhe.stride(-1) != 1:
        raise ValueError(
            f"merge_attention works in place on rows that lie together; the stride is {out_qhe.stride(-1)}"
        )
    block_out = triton_support.rows(block_out_qhe)
    block = block_of(head_dim)
    rows = max(1, _ELEMENTS // block)
    triton_support.launch(
        merge_attention_in_place,
        (-(-queries * heads // rows),),
        out_qhe,
        lse_qh,
        block_out,
        block_lse_qh,
        queries * heads,
        heads,
        *out_qhe.stride()[:2],
        *lse_qh.stride(),
        *block_out.stride()[:2],
        *block_lse_qh.stride(),
        HEAD=head_dim,
        BLOCK=block,
        ROWS=rows,
        warps=4,
    )


@fused("merge_attention", _triton, mutates=("out_qhe", "lse_qh"))
def _merge(out_qhe: Tensor, lse_qh: Tensor, block_out_qhe: Tensor, block_lse_qh: Tensor) -> None:
    merge_attention.reference(out_qhe, lse_qh, block_out_qhe, block_lse_qh)


merge_attention.implementation("triton", usable=triton_support.usable)(_merge)
