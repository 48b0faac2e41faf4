"""The Triton kernels of every modulated norm: RMSNorm or LayerNorm, with or without a gated residual before it.

A program takes a chunk of consecutive tokens, sample after sample, so that what belongs to a sample is read once for
all its tokens. Gradients of what belongs to a sample are summed in the order of the tokens: chunk c leaves its sums
for sample s in row c + s of a buffer (along a pack c or s grows from one such pair to the next, so no two pairs share
a row), and a second kernel adds up each sample's rows. No atomics: two runs give the same bits.

Shape suffixes: t token, d model dim, n sample.
"""

import torch
from torch import Tensor

from . import triton_support
from .triton_support import block_of, first_row_from, jit, rows, tl

FORWARD_CHUNK = 8
SUM_COLUMNS, SUM_ROWS = 32, 64


@jit
def modulated_norm_forward(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    sample_id_ptr,
    sum_ptr,
    out_ptr,
    moments_ptr,
    tokens,
    chunk,
    x_stride,
    y_stride,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(row + chunk, tokens)
    while row < stop:
        sample = tl.load(sample_id_ptr + row).to(tl.int64)
        end = first_row_from(sample_id_ptr, row, stop, sample + 1, 32)
        factor = 1.0 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            factor *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        for token in tl.range(row, end, num_stages=STAGES):
            x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if y_ptr is not None:
                y = tl.load(y_ptr + token * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
                rounded = (x + gate * y).to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + token * WIDTH + columns, rounded, mask=inside)
                x = rounded.to(tl.float32)  # what the backward pass finds
            if CENTRED:
                mean = tl.sum(x) / WIDTH
                tl.store(moments_ptr + tokens + token, mean)
                x = tl.where(inside, x - mean, 0.0)
            inverse = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
            tl.store(moments_ptr + token, inverse)
            out = (x * inverse) * factor + shift
            tl.store(out_ptr + token * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
        row = end


@jit
def modulated_norm_backward(
    grad_out_ptr,
    grad_sum_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    sample_id_ptr,
    moments_ptr,
    grad_x_ptr,
    grad_y_ptr,
    partial_ptr,
    tokens,
    chunk,
    gate_stride,
    scale_stride,
    partial_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    program = tl.program_id(0).to(tl.int64)
    row = program * chunk
    stop = tl.minimum(row + chunk, tokens)
    while row < stop:
        sample = tl.load(sample_id_ptr + row).to(tl.int64)
        end = first_row_from(sample_id_ptr, row, stop, sample + 1, 128)
        factor = 1.0 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            factor *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
            of_gate = tl.zeros((BLOCK,), tl.float32)
        along = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for token in tl.range(row, end, num_stages=STAGES):
            at = token * WIDTH + columns  # one address for all, or registers spill
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.load(moments_ptr + token)
            if CENTRED:
                x -= tl.load(moments_ptr + tokens + token)
            normed = x * inverse  # beside the row too, where grad is 0
            along += grad * normed
            total += grad
            grad *= factor
            back = grad - normed * (tl.sum(grad * normed) / WIDTH)
            if CENTRED:
                back -= tl.sum(grad) / WIDTH
            back *= inverse
            if y_ptr is not None:
                back += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
                y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
                of_gate += back * y
                grad_y = (gate * back).to(grad_y_ptr.dtype.element_ty)
                tl.store(grad_y_ptr + at, grad_y, mask=inside)
            tl.store(grad_x_ptr + at, back.to(grad_x_ptr.dtype.element_ty), mask=inside)
        leave = partial_ptr + (program + sample) * WIDTH + columns
        tl.store(leave, along, mask=inside)
        tl.store(leave + partial_stride, total, mask=inside)
        if y_ptr is not None:
            tl.store(leave + partial_stride + partial_stride, of_gate, mask=inside)
        row = end


@jit
def sum_over_chunks(
    partial_ptr,
    sample_id_ptr,
    weight_ptr,
    scale_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    grad_gate_ptr,
    grad_weight_ptr,
    tokens,
    chunk,
    scale_stride,
    partial_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Gradients of one sample's vectors; of the weight, its part."""
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    everything = tl.full((), 0, tl.int64) + tokens
    low = first_row_from(sample_id_ptr, tl.full((), 0, tl.int64), everything, sample, SEARCH)
    high = first_row_from(sample_id_ptr, low, everything, sample + 1, SEARCH)
    first, last = low // chunk, tl.cdiv(high, chunk)
    last = tl.where(low < high, last, first)
    totals = tl.zeros((ROWS, COLUMNS), tl.float32)
    alongs = tl.zeros((ROWS, COLUMNS), tl.float32)
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk_id in tl.range(first, last, ROWS):
        chunks = chunk_id + tl.arange(0, ROWS)
        mask = (chunks < last)[:, None] & inside[None, :]
        at = partial_ptr + (chunks + sample)[:, None] * WIDTH + columns[None, :]
        if grad_scale_ptr is not None:
            alongs += tl.load(at, mask=mask, other=0.0)
            totals += tl.load(at + partial_stride, mask=mask, other=0.0)
        if grad_gate_ptr is not None:
            at_gate = at if grad_scale_ptr is None else at + partial_stride + partial_stride
            gates += tl.load(at_gate, mask=mask, other=0.0)
    at = sample * WIDTH + columns
    if grad_gate_ptr is not None:
        tl.store(grad_gate_ptr + at, tl.sum(gates, 0).to(grad_gate_ptr.dtype.element_ty), mask=inside)
    if grad_scale_ptr is not None:
        along = tl.sum(alongs, 0)
        tl.store(grad_shift_ptr + at, tl.sum(totals, 0).to(grad_shift_ptr.dtype.element_ty), mask=inside)
        if weight_ptr is not None:
            scale = tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_weight_ptr + at, (1.0 + scale) * along, mask=inside)
            along *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_scale_ptr + at, along.to(grad_scale_ptr.dtype.element_ty), mask=inside)


def forward(
    x_td: Tensor,
    weight_d: Tensor | None,
    scale_nd: Tensor,
    shift_nd: Tensor,
    sample_id_t: Tensor,
    eps: float,
    centred: bool,
    residual: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x + gate·y (given ``residual``: gate, y), its modulated norm, and the moments (1 or 2, T) of it."""
    tokens, width = x_td.shape
    x, scale, shift = rows(x_td), rows(scale_nd), rows(shift_nd)
    gate, y = (None, None) if residual is None else (rows(r) for r in residual)
    summed = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty((tokens, width), dtype=result_dtype(x, scale, shift), device=x.device)
    moments = torch.empty((1 + centred, tokens), dtype=torch.float32, device=x.device)
    if tokens:
        warps = max(1, min(8 if width <= 4096 else 16, block_of(width) // (512 if y is None else 256)))
        chunk = _forward_chunk(x, 16 // warps)
        triton_support.launch(
            modulated_norm_forward,
            (-(-tokens // chunk),),
            x,
            y,
            gate,
            None if weight_d is None else weight_d.contiguous(),
            scale,
            shift,
            sample_id_t.contiguous(),
            summed,
            out,
            moments,
            tokens,
            chunk,
            x.stride(0),
            0 if y is None else y.stride(0),
            0 if gate is None else gate.stride(0),
            scale.stride(0),
            shift.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block_of(width),
            CENTRED=centred,
            STAGES=triton_support.stages(x, _row_bytes(x, y)),
            warps=warps,
        )
    return summed, out, moments


def _row_bytes(*streams: Tensor | None) -> int:
    """That a program holds for a token, of which it reads a row of each."""
    return sum(block_of(x.shape[1]) * x.element_size() for x in streams if x is not None)


def _forward_chunk(x_td: Tensor, programs_each: int) -> int:
    """The tokens of a program: few, so that programs end evenly, unless a few more let all programs run at once."""
    at_once = -(-len(x_td) // triton_support.programs_at_once(x_td, programs_each))
    return at_once if at_once <= 2 * FORWARD_CHUNK else FORWARD_CHUNK


def backward(
    grad_out_td: Tensor,
    x_td: Tensor,
    weight_d: Tensor | None,
    scale_nd: Tensor,
    shift_dtype: torch.dtype,
    sample_id_t: Tensor,
    moments_mt: Tensor,
    residual: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, scale, shift), then, given ``residual`` (gradient of the sum, gate, y), of (gate, y)."""
    tokens, width = x_td.shape
    samples = len(scale_nd)
    grad_out, x, sample_id = (tensor.contiguous() for tensor in (grad_out_td, x_td, sample_id_t))
    weight = None if weight_d is None else weight_d.contiguous()
    scale, grad_sum, gate, y = rows(scale_nd), None, None, None
    if residual is not None:
        grad_sum, gate, y = residual[0].contiguous(), rows(residual[1]), residual[2].contiguous()
    contiguous = torch.contiguous_format
    grad_x = torch.empty_like(x, memory_format=contiguous)
    grad_y = None if y is None else torch.empty_like(y, memory_format=contiguous)
    half = x.element_size() == 2 and y is None  # otherwise registers spill
    warps = max(1, min(16, block_of(width) // (512 if half else 256)))
    chunk, partial = partial_sums(x, samples, 2 if y is None else 3, 16 // warps)  # as many programs as fit
    if tokens:
        triton_support.launch(
            modulated_norm_backward,
            (-(-tokens // chunk),),
            grad_out,
            grad_sum,
            x,
            y,
            gate,
            weight,
            scale,
            sample_id,
            moments_mt,
            grad_x,
            grad_y,
            partial,
            tokens,
            chunk,
            0 if y is None else gate.stride(0),
            scale.stride(0),
            partial.stride(0),
            WIDTH=width,
            BLOCK=block_of(width),
            CENTRED=len(moments_mt) == 2,
            STAGES=triton_support.stages(x, _row_bytes(x, grad_out, y, grad_sum)),
            warps=warps,
        )
    grad_scale = torch.empty_like(scale, memory_format=contiguous)
    grad_shift = torch.empty_like(grad_scale, dtype=shift_dtype)
    grad_gate = None if gate is None else torch.empty_like(gate, memory_format=contiguous)
    of_weight = None if weight is None else torch.empty(samples, width, dtype=torch.float32, device=x.device)
    launch_sum(partial, sample_id, chunk, weight, scale, (grad_scale, grad_shift, grad_gate, of_weight))
    grad_weight = None if weight is None else of_weight.sum(0).to(weight.dtype)
    grads = (grad_x, grad_weight, grad_scale, grad_shift)
    return grads if y is None else (*grads, grad_gate, grad_y)


def partial_sums(x_td: Tensor, samples: int, count: int, programs_each: int) -> tuple[int, Tensor]:
    """The tokens of a chunk, and room (count, chunks + samples, D) for each chunk's sums: bounded by the device."""
    tokens, width = x_td.shape
    chunk = max(1, -(-tokens // triton_support.programs_at_once(x_td, programs_each)))
    slots = -(-tokens // chunk) + samples
    return chunk, torch.empty(count, slots, width, dtype=torch.float32, device=x_td.device)


def launch_sum(
    partial: Tensor,
    sample_id_t: Tensor,
    chunk: int,
    weight: Tensor | None,
    scale: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None:
    """Add up the chunks' sums; `grads` (of scale, shift, gate, and the weight's part of each sample) are filled."""
    found = next(grad for grad in grads if grad is not None)
    samples, width = found.shape
    if samples and width:
        triton_support.launch(
            sum_over_chunks,
            (samples, -(-width // SUM_COLUMNS)),
            partial,
            sample_id_t,
            weight,
            scale,
            *grads,
            len(sample_id_t),
            chunk,
            0 if scale is None else scale.stride(0),
            partial.stride(0),
            WIDTH=width,
            COLUMNS=SUM_COLUMNS,
            ROWS=SUM_ROWS,
            SEARCH=1024,
            warps=4,
        )


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """What torch makes of a sum of them."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
