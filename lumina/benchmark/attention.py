"""`lumina benchmark attention`: every backend that can run here, and rings of it in one process, on one long sample.

Counted are 4 FLOPs for each pair of tokens and element of a token, and 10 in the backward pass, as is usual for kernels
that compute the scores anew there. Errors are against float64, of one head, relative in L2.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.benchmark import record, timing
from lumina.benchmark.kernels import DTYPES
from lumina.kernels import AttentionPlan, attention, with_lse
from lumina.kernels.attention_lse_backends import BACKENDS, CUDNN_MIN_ROWS, lse_backend
from lumina.parallel.ring import in_process_ring

TOKENS = {"cuda": (4096, 16384, 32768, 65536, 131072), "cpu": (2048,)}
HEADS = {"cuda": 32, "cpu": 4}
RINGS = (2, 4, 8)
_REFERENCE_TOKENS = 4096  # the reference holds all pairs of tokens
_QUERIES_AT_ONCE = 1024

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v and the gradient of the output, each (T, H, E)."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One backend's measurement, called once (`ring` None) or through a ring."""

    backend: str
    ring: int | None
    default: bool
    head_dim: int
    heads: int
    tokens: int
    dtype: str
    forward_seconds: float
    backward_seconds: float
    forward_tflops: float
    backward_tflops: float
    errors: dict[str, float]  # of out, dq, dk, dv


def _inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(tokens + head_dim)
    return tuple(
        torch.randn(tokens, heads, head_dim, dtype=dtype, device=device, generator=generator) for _ in range(4)
    )


def exact(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Out, dq, dk, dv (T, E) of one head in float64, a few queries at a time."""
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    scale = 1 / math.sqrt(q.shape[-1])
    found = {"out": [], "dq": [], "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    for rows_q, rows_grad in zip(q.split(_QUERIES_AT_ONCE), grad_out.split(_QUERIES_AT_ONCE), strict=True):
        p = (rows_q @ k.mT * scale).softmax(-1)
        out = p @ v
        found["out"].append(out)
        found["dv"] += p.mT @ rows_grad
        d_scores = p * (rows_grad @ v.mT - (rows_grad * out).sum(-1, keepdim=True)) * scale
        found["dq"].append(d_scores @ k)
        found["dk"] += d_scores.mT @ rows_q
    return found | {name: torch.cat(found[name]) for name in ("out", "dq")}


def contenders(q: Tensor) -> Iterator[tuple[str, int | None, Attention]]:
    """(backend, ring, function) of all that can run on such queries: torch's own choice, one call of each, rings."""
    tokens = len(q)
    plan = AttentionPlan((tokens,), (tokens,), q.device)
    yield "sdpa", None, lambda q, k, v: attention.named("sdpa")(q, k, v, plan)
    for backend in BACKENDS:
        if backend.usable(q) and (backend.name != "reference" or tokens <= _REFERENCE_TOKENS):
            yield backend.name, None, lambda q, k, v, backend=backend: with_lse(backend, q, k, v, plan)
    default = lse_backend(q).name
    for size in RINGS:
        yield default, size, lambda q, k, v, size=size: in_process_ring(q, k, v, (tokens,), size, default)


def _errors(function: Attention, inputs: Inputs, truth: dict[str, Tensor]) -> dict:
    """Of the last head, all heads being computed."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = function(q, k, v)
    found = (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3]))
    return {
        name: float((x[:, -1].double() - truth[name]).norm() / truth[name].norm())
        for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True)
    }


def measured(inputs: Inputs, truth: dict[str, Tensor], name: str, ring: int | None, function: Attention) -> Row:
    """One contender at one size."""
    tokens, heads, head_dim = inputs[0].shape
    errors = _errors(function, inputs, truth)
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    forward, backward = timing.forward_and_backward(function, leaves, inputs[0].device)
    flops = 4 * tokens**2 * heads * head_dim
    return Row(
        name,
        ring,
        name == lse_backend(inputs[0]).name,
        head_dim,
        heads,
        tokens,
        str(inputs[0].dtype).removeprefix("torch."),
        forward,
        backward,
        flops / forward / 1e12,
        2.5 * flops / backward / 1e12,
        errors,
    )


def _all_measured(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator:
    """(what it is, an iterator over its row) of each contender at one size."""
    inputs = _inputs(tokens, heads, head_dim, dtype, device)
    truth = exact(*(x[:, -1] for x in inputs))
    for name, ring, function in contenders(inputs[0]):
        what = f"{tokens:,} tokens, heads of {head_dim}, {name}" + (f", ring of {ring}" if ring else "")
        yield what, (measured(inputs, truth, name, ring, function) for _ in range(1))


def benchmark_attention(arguments: argparse.Namespace) -> None:
    """The verb: measures, prints a table, and writes the rows to `--out`."""
    record.check_writable(arguments.out)
    device = record.device_of(arguments.device)
    tokens = arguments.tokens or TOKENS[device.type]
    heads = HEADS[device.type] if arguments.heads is None else arguments.heads
    for name, values in (("tokens", tokens), ("head-dim", arguments.head_dim), ("heads", [heads])):
        if min(values) <= 0:
            raise ValueError(f"--{name} {min(values)} is not positive")
    facts = record.surroundings(device)
    print(record.heading(facts))
    if device.type == "cpu":
        print("On a CPU: torch's CPU kernel and the reference. FlashAttention and cuDNN run on a GPU alone.\n")
    results = record.Results(arguments.out, facts)
    for head_dim in arguments.head_dim:
        for count in tokens:
            print(f"{count:,} tokens, {heads} heads of {head_dim} …", file=sys.stderr)
            for what, row in _all_measured(count, heads, head_dim, DTYPES[arguments.dtype], device):
                results.add(what, row)
    print(_table(results.rows) + results.said())


def _runs(row: Row) -> str:
    """What the backend comes down to: cuDNN's leaves short blocks to torch's FlashAttention-2."""
    short = row.backend == "cudnn" and row.tokens // (row.ring or 1) < CUDNN_MIN_ROWS
    return "flash for cudnn" if short else row.backend


def _table(rows: list[Row]) -> str:
    """Rings beside one call of their backend: how much longer they take, and their errors over its."""
    calls = {(row.backend, row.head_dim, row.tokens): row for row in rows if row.ring is None}
    lines = []
    for row in rows:
        one = calls.get((row.backend, row.head_dim, row.tokens))
        against = ["", ""]
        if row.ring is not None and one is not None:
            taken = (row.forward_seconds + row.backward_seconds) / (one.forward_seconds + one.backward_seconds)
            worst = max(row.errors[name] / max(one.errors[name], 1e-30) for name in row.errors)
            against = [f"{taken - 1:+.1%}", f"{worst:.2f}×"]
        lines.append(
            (
                row.head_dim,
                f"{row.tokens:,}",
                _runs(row) + (" (default)" if row.default and row.ring is None else ""),
                "one call" if row.ring is None else f"ring of {row.ring}",
                f"{row.forward_seconds * 1e3:,.2f}",
                f"{row.backward_seconds * 1e3:,.2f}",
                f"{row.forward_tflops:,.3g}",
                f"{row.backward_tflops:,.3g}",
                f"{max(row.errors.values()):.1e}",
                *against,
            )
        )
    columns = ["head", "tokens", "backend", "", "forward, ms", "backward, ms", "TFLOP/s", "backward", "error"]
    return record.table([*columns, "time of ring", "error of ring"], lines)
