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
from lumina.kernels.attention_lse_backends import BACKENDS, lse_backend
from lumina.parallel.ring import in_process_ring

TOKENS = {"cuda": (4096, 16384, 32768, 65536, 131072), "cpu": (2048,)}
HEADS = {"cuda": 32, "cpu": 4}
RINGS = (1, 2, 4, 8)
_REFERENCE_TOKENS = 4096  # the reference holds all pairs of tokens
_QUERIES_AT_ONCE = 1024

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v and the gradient of the output, each (T, H, E)."""


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


def contenders(q: Tensor, heads: int) -> Iterator[tuple[str, int | None, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """(backend, ring, function) of all that can run on such queries."""
    tokens = len(q)
    for backend in BACKENDS:
        if not backend.usable(q) or (backend.name == "reference" and tokens > _REFERENCE_TOKENS):
            continue
        yield backend.name, None, lambda q, k, v, name=backend.name: in_process_ring(q, k, v, (len(q),), 1, name)
    default = lse_backend(q).name
    for size in RINGS[1:]:
        yield default, size, lambda q, k, v, size=size: in_process_ring(q, k, v, (len(q),), size, default)


def _errors(function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, truth: dict[str, Tensor]) -> dict:
    """Of the last head, all heads being computed."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = function(q, k, v)
    found = (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3]))
    return {
        name: float((x[:, -1].double() - truth[name]).norm() / truth[name].norm())
        for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True)
    }


def measured(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Rows of all contenders at one size; of one that runs out of memory, none."""
    inputs = _inputs(tokens, heads, head_dim, dtype, device)
    truth = exact(*(x[:, -1] for x in inputs))
    flops = 4 * tokens**2 * heads * head_dim
    for name, ring, function in contenders(inputs[0], heads):
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        try:
            errors = _errors(function, inputs, truth)
            forward, backward = timing.forward_and_backward(function, leaves, device)
        except torch.cuda.OutOfMemoryError:
            print(f"{tokens:,} tokens, heads of {head_dim}: {name} needs more memory", file=sys.stderr)
            continue
        yield Row(
            name,
            ring,
            name == lse_backend(inputs[0]).name,
            head_dim,
            heads,
            tokens,
            str(dtype).removeprefix("torch."),
            forward,
            backward,
            flops / forward / 1e12,
            2.5 * flops / backward / 1e12,
            errors,
        )


def benchmark_attention(arguments: argparse.Namespace) -> None:
    """The verb: measures, prints a table, and writes the rows to `--out`."""
    record.check_writable(arguments.out)
    device = record.device_of(arguments.device)
    tokens, heads = arguments.tokens or TOKENS[device.type], arguments.heads or HEADS[device.type]
    for name, values in (("tokens", tokens), ("head-dim", arguments.head_dim), ("heads", [heads])):
        if min(values) <= 0:
            raise ValueError(f"--{name} {min(values)} is not positive")
    facts = record.surroundings(device)
    print(record.heading(facts))
    if device.type == "cpu":
        print("On a CPU: torch's CPU kernel and the reference. FlashAttention and cuDNN run on a GPU alone.\n")
    rows: list[Row] = []
    for head_dim in arguments.head_dim:
        for count in tokens:
            print(f"{count:,} tokens, {heads} heads of {head_dim} …", file=sys.stderr)
            rows += measured(count, heads, head_dim, DTYPES[arguments.dtype], device)
    print(_table(rows))
    if arguments.out:
        record.write_json(arguments.out, facts, rows)


def _table(rows: list[Row]) -> str:
    """Rings beside one call of their backend: how much longer they take, and their errors over its."""
    calls = {(row.backend, row.head_dim, row.tokens): row for row in rows if row.ring is None}
    lines = []
    for row in rows:
        one = calls.get((row.backend, row.head_dim, row.tokens))
        against = ["", ""]
        if row.ring is not None and one is not None:
            taken = (row.forward_seconds + row.backward_seconds) / (one.forward_seconds + one.backward_seconds)
            worst = max(row.errors[name] / one.errors[name] for name in row.errors)
            against = [f"{taken - 1:+.1%}", f"{worst:.2f}×"]
        lines.append(
            (
                row.head_dim,
                f"{row.tokens:,}",
                row.backend + (" (default)" if row.default and row.ring is None else ""),
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
