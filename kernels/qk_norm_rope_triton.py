"""The Triton kernels of KQ-norm and rotary embedding; queries and keys in one launch, a program for rows of either.

Moments are (4, T): mean and variance of the queries of each token, then of the keys.
"""

import torch
from torch import Tensor

from . import triton_support
from .triton_support import block_of, jit, rows, tl

_FORWARD_CHUNK = 8


@jit
def _normalise_and_rotate(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    moments_ptr,
    tokens,
    row,
    stop,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    pairs = tl.arange(0, BLOCK // 2)
    angle, pairs_inside = pairs % HALF, pairs < WIDTH // 2
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for token in tl.range(row, stop):
        x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if moments_ptr is not None:
            if OUTSIDE:
                mean, variance = tl.load(moments_ptr + token), tl.load(moments_ptr + tokens + token)
                x = tl.where(inside, x - mean, 0.0)
            else:
                mean = tl.sum(x) / WIDTH
                x = tl.where(inside, x - mean, 0.0)
                variance = tl.sum(x * x) / WIDTH
                tl.store(moments_ptr + token, mean)
                tl.store(moments_ptr + tokens + token, variance)
        if out_ptr is not None:
            if weight_ptr is not None:
                x = x * tl.rsqrt(variance + eps) * weight + bias
            even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
            cos = tl.load(cos_ptr + token * HALF + angle, mask=pairs_inside, other=0.0)
            sin = tl.load(sin_ptr + token * HALF + angle, mask=pairs_inside, other=0.0)
            out = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
            tl.store(out_ptr + token * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def qk_norm_rope_forward(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    moments_ptr,
    tokens,
    chunk,
    q_stride,
    k_stride,
    eps,
    Q_WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(row + chunk, tokens)
    k_moments_ptr = moments_ptr
    if moments_ptr is not None:
        k_moments_ptr = moments_ptr + 2 * tokens
    if tl.program_id(1) == 0:
        _normalise_and_rotate(
            q_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, q_out_ptr, moments_ptr,
            tokens, row, stop, q_stride, eps, Q_WIDTH, HALF, Q_BLOCK, OUTSIDE,
        )  # fmt: skip
    else:
        _normalise_and_rotate(
            k_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, k_out_ptr, k_moments_ptr,
            tokens, row, stop, k_stride, eps, K_WIDTH, HALF, K_BLOCK, OUTSIDE,
        )  # fmt: skip


@jit
def _differentiate(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    moments_ptr,
    means_ptr,
    grad_x_ptr,
    partial_ptr,
    tokens,
    row,
    stop,
    grad_stride,
    grad_head_stride,
    x_stride,
    partial_stride,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    pairs = tl.arange(0, BLOCK // 2)
    angle, pairs_inside = pairs % HALF, pairs < WIDTH // 2
    grad_columns = (columns // (2 * HALF)).to(tl.int64) * grad_head_stride + columns % (2 * HALF)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in tl.range(row, stop, num_stages=STAGES):
        grad = tl.load(grad_ptr + token * grad_stride + grad_columns, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(grad, (BLOCK // 2, 2)))
        cos = tl.load(cos_ptr + token * HALF + angle, mask=pairs_inside, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + angle, mask=pairs_inside, other=0.0)
        grad = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (BLOCK,))
        if weight_ptr is not None:
            x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.load(moments_ptr + tokens + token) + eps)
            normed = (x - tl.load(moments_ptr + token)) * inverse  # beside the row too, where grad is 0
            along += grad * normed
            total += grad
            grad *= weight
            if means_ptr is None or grad_x_ptr is None:
                mean, mean_along = tl.sum(grad) / WIDTH, tl.sum(grad * normed) / WIDTH
                if means_ptr is not None:
                    tl.store(means_ptr + token, mean)
                    tl.store(means_ptr + tokens + token, mean_along)
            else:
                mean, mean_along = tl.load(means_ptr + token), tl.load(means_ptr + tokens + token)
            grad = (grad - mean - normed * mean_along) * inverse
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + token * WIDTH + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        leave = partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH + columns
        tl.store(leave, along, mask=inside)
        tl.store(leave + partial_stride, total, mask=inside)


@jit
def qk_norm_rope_backward(
    grad_q_out_ptr,
    grad_k_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    moments_ptr,
    means_ptr,
    grad_q_ptr,
    grad_k_ptr,
    q_partial_ptr,
    k_partial_ptr,
    tokens,
    chunk,
    grad_q_stride,
    grad_q_head_stride,
    grad_k_stride,
    grad_k_head_stride,
    q_stride,
    k_stride,
    q_partial_stride,
    k_partial_stride,
    eps,
    Q_WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(row + chunk, tokens)
    k_moments_ptr, k_means_ptr = moments_ptr, means_ptr
    if moments_ptr is not None:
        k_moments_ptr = moments_ptr + 2 * tokens
    if means_ptr is not None:
        k_means_ptr = means_ptr + 2 * tokens
    if tl.program_id(1) == 0:
        _differentiate(
            grad_q_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, moments_ptr, means_ptr, grad_q_ptr, q_partial_ptr,
            tokens, row, stop, grad_q_stride, grad_q_head_stride, q_stride, q_partial_stride, eps,
            Q_WIDTH, HALF, Q_BLOCK, STAGES,
        )  # fmt: skip
    else:
        _differentiate(
            grad_k_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_moments_ptr, k_means_ptr, grad_k_ptr,
            k_partial_ptr, tokens, row, stop, grad_k_stride, grad_k_head_stride, k_stride, k_partial_stride, eps,
            K_WIDTH, HALF, K_BLOCK, STAGES,
        )  # fmt: skip


def forward(
    q_tw: Tensor,
    k_tw: Tensor,
    affine: tuple[Tensor | None, ...],
    cos_th: Tensor | None,
    sin_th: Tensor | None,
    eps: float,
    moments_4t: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """q and k (T, heads, D) normed and rotated, and the moments that were found (or (0, T) where none were).

    `affine`: weight and bias of q, then of k, or None. Without cos and sin, moments alone.
    """
    tokens, q_width, k_width = len(q_tw), q_tw.shape[1], k_tw.shape[1]
    q, k = rows(q_tw), rows(k_tw)
    normed = affine[0] is not None or cos_th is None
    found = torch.empty(4 if normed and moments_4t is None else 0, tokens, dtype=torch.float32, device=q.device)
    half, q_out, k_out = 1, None, None
    if cos_th is not None:
        half, cos_th, sin_th = cos_th.shape[1], cos_th.contiguous(), sin_th.contiguous()
        q_out, k_out = (
            torch.empty(tokens, x.shape[1] // (2 * half), 2 * half, dtype=x.dtype, device=x.device) for x in (q, k)
        )
    if tokens:
        chunk = min(_FORWARD_CHUNK, tokens)
        triton_support.launch(
            qk_norm_rope_forward,
            (-(-tokens // chunk), 2),
            q,
            k,
            *(None if x is None else x.contiguous() for x in affine),
            cos_th,
            sin_th,
            q_out,
            k_out,
            (found if moments_4t is None else moments_4t.contiguous()) if normed else None,
            tokens,
            chunk,
            q.stride(0),
            k.stride(0),
            eps,
            Q_WIDTH=q_width,
            K_WIDTH=k_width,
            Q_BLOCK=block_of(q_width),
            K_BLOCK=block_of(k_width),
            HALF=half,
            OUTSIDE=moments_4t is not None,
            warps=max(1, min(16, block_of(max(q_width, k_width)) // 512)),
        )
    return q_out, k_out, found


def backward(
    grads_thd: tuple[Tensor, Tensor],
    q_tw: Tensor | None,
    k_tw: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor | None,
    eps: float,
    means_4t: Tensor | None = None,
    *,
    inputs: bool = True,
    parameters: bool = True,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """Gradients of q and k (T, W), of (q_weight, q_bias, k_weight, k_bias), and the means over the width.

    Without `inputs`, the means (4, T) of each row's gradient and of its part along the normed row, of q and of k, in
    place of the gradients of q and k; given them, back they go to make these.
    """
    gq, gk = (x if x.stride(-1) == 1 else x.contiguous() for x in grads_thd)
    tokens, half, device = len(gq), cos_th.shape[1], gq.device
    widths = [x.shape[1] * x.shape[2] for x in (gq, gk)]
    normed = weights[0] is not None
    grad_q, grad_k = (
        torch.empty(tokens, width, dtype=x.dtype, device=device) if inputs else None
        for x, width in zip((gq, gk), widths, strict=True)
    )
    if not inputs:
        means_4t = torch.empty(4, tokens, dtype=torch.float32, device=device)
    chunk = max(1, -(-tokens // triton_support.programs_at_once(gq, 1)))
    q_partial, k_partial = (
        torch.empty(2, -(-tokens // chunk), width, dtype=torch.float32, device=device)
        if normed and parameters
        else None
        for width in widths
    )
    if tokens:
        q, k = (None if x is None else rows(x) for x in (q_tw, k_tw))
        # Room for both kinds of rows is set aside in every program; angles are in fp32.
        each = 4 + gq.element_size() + (0 if q is None else q.element_size())
        row_bytes = sum(block_of(width) * each for width in widths)
        triton_support.launch(
            qk_norm_rope_backward,
            (-(-tokens // chunk), 2),
            gq,
            gk,
            q,
            k,
            *(None if x is None else x.contiguous() for x in weights),
            cos_th.contiguous(),
            sin_th.contiguous(),
            None if moments_4t is None else moments_4t.contiguous(),
            None if means_4t is None else means_4t.contiguous(),
            grad_q,
            grad_k,
            q_partial,
            k_partial,
            tokens,
            chunk,
            gq.stride(0),
            gq.stride(1),
            gk.stride(0),
            gk.stride(1),
            0 if q is None else q.stride(0),
            0 if k is None else k.stride(0),
            0 if q_partial is None else q_partial.stride(0),
            0 if k_partial is None else k_partial.stride(0),
            eps,
            Q_WIDTH=widths[0],
            K_WIDTH=widths[1],
            Q_BLOCK=block_of(widths[0]),
            K_BLOCK=block_of(widths[1]),
            HALF=half,
            STAGES=triton_support.stages(gq, row_bytes),
            warps=max(1, min(16, block_of(max(widths)) // 256)),
        )
    of_parameters = ()
    if q_partial is not None:
        of_parameters = tuple(
            sums.sum(0).to(weight.dtype)  # each on its own: outputs of a custom op share no memory
            for weight, partial in zip(weights, (q_partial, k_partial), strict=True)
            for sums in partial
        )
    return grad_q, grad_k, of_parameters, means_4t
