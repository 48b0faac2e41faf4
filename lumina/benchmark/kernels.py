"""`lumina benchmark kernels`: each fused operation, forward and backward, beside what else could do it.

For each: the time, and what share of the copy bandwidth of the same run the bytes make that it must move.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina import kernels
from lumina.benchmark import contenders, record, timing
from lumina.benchmark.contenders import Contender, compiled
from lumina.model.config import FlagDiTConfig

HEADS = 32
SAMPLE = 4096
"""Tokens of a sample of the pack."""
TOKENS = {"cuda": (4096, 32768, 131072), "cpu": (1024,)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONTENDERS = ("lumina", "torch", "compile", "liger", "apex")
_RMS_EPS, _LAYER_EPS = 1e-5, 1e-6


@dataclass(frozen=True)
class Size:
    """Of a pack of samples of equal length, in a model of `hidden` elements a token."""

    hidden: int
    tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def samples(self) -> int:
        return self.tokens // SAMPLE if self.tokens % SAMPLE == 0 else 1

    @property
    def ffn(self) -> int:
        """Elements of a token inside the feed-forward network."""
        return FlagDiTConfig(dim=self.hidden, n_heads=HEADS).ffn_dim

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def sample_id(self) -> Tensor:
        ids = torch.arange(self.samples, device=self.device)
        return ids.repeat_interleave(self.tokens // self.samples)

    def bytes(self, *streams: int) -> int:
        """That tensors of a row a token move, given how wide each is."""
        return self.tokens * sum(streams) * self.dtype.itemsize


@dataclass(frozen=True)
class Workload:
    """An operation at one size. Every contender takes `inputs` and gives the same; None where there is none."""

    inputs: list[Tensor]
    contenders: dict[str, Contender | None]
    forward_bytes: int
    backward_bytes: int | None  # None where it works in place and has no backward pass


@dataclass(frozen=True)
class Row:
    """One contender's measurement."""

    operation: str
    direction: str
    hidden: int
    tokens: int | None  # None where there are none
    dtype: str
    contender: str
    runs: str
    bytes: int
    seconds: float
    fraction_of_copy: float


def _batched(function: Contender | None, size: Size, *tokenwise: int) -> Contender | None:
    """`function` over (N, L, D), called with the inputs at these places as (T, D), and back."""
    if function is None:
        return None

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = [x.unflatten(0, (size.samples, -1)) if i in tokenwise else x for i, x in enumerate(inputs)]
        outputs = function(*given)
        return tuple(x.flatten(0, 1) for x in outputs) if isinstance(outputs, tuple) else outputs.flatten(0, 1)

    return run


def _with_eps(function: Contender | None, eps: float) -> Contender | None:
    return function and (lambda *inputs: function(*inputs, eps))


def _vectors(size: Size, count: int) -> list[Tensor]:
    """As the modulation gives them: side by side."""
    return list((size.new(size.samples, count * size.hidden) / 4).chunk(count, -1))


def _all(size: Size, ours: Contender, plain: Contender, **others: Contender | None) -> dict[str, Contender | None]:
    made = compiled(plain) if contenders.compiles(size.device) else None
    gpu = size.device.type == "cuda"
    return {"lumina": ours, "torch": plain, "compile": made} | {k: v if gpu else None for k, v in others.items()}


def rms_norm_modulate(size: Size) -> Workload:
    ids = size.sample_id()

    def of(function: Contender | None) -> Contender | None:
        return _batched(_with_eps(function, _RMS_EPS), size, 0)

    return Workload(
        [size.new(size.tokens, size.hidden), size.new(size.hidden), *_vectors(size, 2)],
        _all(
            size,
            lambda *inputs: kernels.rms_norm_modulate(*inputs, ids, _RMS_EPS),
            of(contenders.rms_norm_modulate),
            liger=of(contenders.liger_rms_norm_modulate()),
            apex=of(contenders.apex_rms_norm_modulate()),
        ),
        size.bytes(*[size.hidden] * 2),
        size.bytes(*[size.hidden] * 3),
    )


def layer_norm_modulate(size: Size) -> Workload:
    ids = size.sample_id()

    def of(function: Contender | None) -> Contender | None:
        return _batched(_with_eps(function, _LAYER_EPS), size, 0)

    return Workload(
        [size.new(size.tokens, size.hidden), *_vectors(size, 2)],
        _all(
            size,
            lambda *inputs: kernels.layer_norm_modulate(*inputs, ids, _LAYER_EPS),
            of(contenders.layer_norm_modulate),
            liger=of(contenders.liger_layer_norm_modulate()),
            apex=of(contenders.apex_layer_norm_modulate()),
        ),
        size.bytes(*[size.hidden] * 2),
        size.bytes(*[size.hidden] * 3),
    )


def gated_residual(size: Size) -> Workload:
    ids = size.sample_id()
    x, y = (size.new(size.tokens, size.hidden) for _ in range(2))
    return Workload(
        [x, _vectors(size, 1)[0], y],
        _all(
            size,
            lambda *inputs: kernels.gated_residual(*inputs, ids),
            _batched(contenders.gated_residual, size, 0, 2),
        ),
        size.bytes(*[size.hidden] * 3),
        size.bytes(*[size.hidden] * 3),  # the gradient and y read, that of y written; that of x is the one that came
    )


def gated_residual_norm(size: Size) -> Workload:
    ids = size.sample_id()
    x, y = (size.new(size.tokens, size.hidden) for _ in range(2))
    gate, scale, shift = _vectors(size, 3)

    def of(function: Contender | None) -> Contender | None:
        return _batched(_with_eps(function, _RMS_EPS), size, 0, 2)

    return Workload(
        [x, gate, y, size.new(size.hidden), scale, shift],
        _all(
            size,
            lambda *inputs: kernels.gated_residual_norm(*inputs, ids, _RMS_EPS),
            of(contenders.gated_residual_norm),
            liger=of(contenders.with_residual(contenders.liger_rms_norm_modulate())),
            apex=of(contenders.with_residual(contenders.apex_rms_norm_modulate())),
        ),
        size.bytes(*[size.hidden] * 4),
        size.bytes(*[size.hidden] * 6),
    )


def qk_norm_rope(size: Size) -> Workload:
    q, k = (size.new(size.tokens, size.hidden) for _ in range(2))
    half = size.hidden // HEADS // 2
    angles = torch.arange(size.tokens, device=size.device)[:, None] * torch.logspace(0, -4, half, device=size.device)
    cos, sin = angles.cos(), angles.sin()
    table = cos.nbytes + sin.nbytes

    def of(function: Contender | None) -> Contender | None:
        return function and (lambda *inputs: function(*inputs, cos, sin))

    return Workload(
        [q, k, *(size.new(size.hidden) for _ in range(4))],
        _all(
            size,
            of(kernels.qk_norm_rope),
            of(contenders.qk_norm_rope),
            liger=of(contenders.liger_qk_norm_rope()),
        ),
        size.bytes(*[size.hidden] * 4) + table,
        size.bytes(*[size.hidden] * 6) + table,
    )


def swiglu(size: Size) -> Workload:
    return Workload(
        [size.new(size.tokens, size.ffn) for _ in range(2)],
        _all(size, kernels.swiglu, contenders.swiglu, liger=contenders.liger_swiglu()),
        size.bytes(*[size.ffn] * 3),
        size.bytes(*[size.ffn] * 5),
    )


def merge_attention(size: Size) -> Workload:
    out = size.new(size.tokens, HEADS, size.hidden // HEADS, dtype=torch.float32)
    block = size.new(size.tokens, HEADS, size.hidden // HEADS)
    lse, block_lse = (size.new(size.tokens, HEADS, dtype=torch.float32) for _ in range(2))
    return Workload(
        [out, lse, block, block_lse],
        _all(size, kernels.merge_attention, contenders.merge_attention),
        2 * out.nbytes + block.nbytes + 3 * lse.nbytes,
        None,
    )


def ema(size: Size) -> Workload:
    """As `lumina.train.ema` does it, with as many fp32 weights as a layer of this width has, in its matrices."""
    shapes = [(size.hidden, size.hidden)] * 4 + [(size.ffn, size.hidden)] * 3
    averages, weights = ([size.new(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    count = len(shapes)

    def of(function: Callable[[list[Tensor], list[Tensor]], None]) -> Contender:
        return lambda *inputs: function(list(inputs[:count]), list(inputs[count:]))

    return Workload(
        [*averages, *weights],
        _all(
            size,
            of(lambda averages, weights: torch._foreach_lerp_(averages, weights, 1e-4)),
            of(lambda averages, weights: contenders.ema(averages, weights, 0.9999)),
        ),
        3 * sum(x.nbytes for x in averages),
        None,
    )


WORKLOADS: dict[str, Callable[[Size], Workload]] = {
    make.__name__: make
    for make in (
        rms_norm_modulate,
        layer_norm_modulate,
        gated_residual,
        gated_residual_norm,
        qk_norm_rope,
        swiglu,
        merge_attention,
        ema,
    )
}
"""By the name of the operation."""
WITHOUT_TOKENS = {"ema"}


def runs(operation: str, contender: str, device: torch.device) -> str:
    """What a contender comes down to: of ours, the implementation that the dispatcher takes."""
    if contender != "lumina":
        return contender
    found = getattr(kernels, operation, None)
    return found.chosen(torch.empty(1, 1, device=device)) if found is not None else "torch.foreach_lerp"


def measured(operation: str, size: Size, contender: str, bandwidth: float) -> Iterator[Row]:
    """Rows of a contender, forward and backward; none if it is not here."""
    workload = WORKLOADS[operation](size)
    function = workload.contenders.get(contender)
    if function is None:
        return
    inputs = [x.requires_grad_(workload.backward_bytes is not None) for x in map(Tensor.detach, workload.inputs)]
    if workload.backward_bytes is None:
        times = (timing.seconds(lambda: function(*inputs), size.device),)
    else:
        times = timing.forward_and_backward(function, inputs, size.device)
    moved = (workload.forward_bytes, workload.backward_bytes)
    for direction, seconds, amount in zip(("forward", "backward"), times, moved, strict=False):
        yield Row(
            operation,
            direction,
            size.hidden,
            None if operation in WITHOUT_TOKENS else size.tokens,
            str(size.dtype).removeprefix("torch."),
            contender,
            runs(operation, contender, size.device),
            amount,
            seconds,
            amount / seconds / bandwidth,
        )


def benchmark_kernels(arguments: argparse.Namespace) -> None:
    """The verb: measures, writes each row to `--out` when it is there, and prints a table at the end."""
    operations = _known("only", arguments.only, tuple(WORKLOADS))
    against = _known("against", arguments.against, CONTENDERS)
    record.check_writable(arguments.out)
    device = record.device_of(arguments.device)
    tokens = arguments.tokens or TOKENS[device.type]
    for hidden in arguments.hidden:
        if hidden <= 0 or hidden % (2 * HEADS):
            raise ValueError(f"--hidden {hidden} is not a multiple of {2 * HEADS}: {HEADS} heads, rotated in pairs")
    if min(tokens) <= 0:
        raise ValueError(f"--tokens {min(tokens)}: a pack has one token at least")
    facts = record.surroundings(device)
    bandwidth = timing.copy_bandwidth(device)
    facts["copy_bandwidth"] = bandwidth
    print(record.heading(facts))
    print(f"Copy bandwidth, bytes read and written: {bandwidth / 1e9:,.1f} GB/s.")
    if device.type == "cpu":
        print("On a CPU `lumina` is the torch references: the Triton kernels, Liger's and apex's run on a GPU alone.")
    results = record.Results(arguments.out, facts)
    for operation in operations:
        for hidden in arguments.hidden:
            for count in tokens[:1] if operation in WITHOUT_TOKENS else tokens:
                size = Size(hidden, count, DTYPES[arguments.dtype], device)
                print(f"{operation}, {count:,} tokens of {hidden} …", file=sys.stderr)
                for contender in against:
                    what = f"{operation}, {count:,} tokens of {hidden}, {contender}"
                    # Inputs are made anew: some contenders write into what they are given.
                    results.add(what, measured(operation, size, contender, bandwidth))
                torch.compiler.reset()  # or shapes add up to torch.compile's limit
    if not results.rows:
        raise ValueError(f"there is nothing to measure: of {', '.join(against)} none can run on {device.type} here")
    print(f"\n{_table(results.rows, against)}{results.said()}")


def _known(option: str, names: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """These names, or all that are known.

    Raises:
        ValueError: for one that is not.
    """
    for name in names or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            nearest = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(known)}"
            raise ValueError(f"--{option} {name} is unknown; {nearest}")
    return tuple(dict.fromkeys(names or known))


def _table(rows: list[Row], names: tuple[str, ...]) -> str:
    """A line for an operation, direction and size; of each contender, time in µs and percent of the copy bandwidth."""
    names = [name for name in names if any(row.contender == name for row in rows)]
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.operation, row.direction, row.hidden, row.tokens, row.bytes), {})[row.contender] = row
    return record.table(
        ["operation", "", "hidden", "tokens", "MB", *(f"{name}, µs (% of copy)" for name in names)],
        [
            (
                operation,
                direction,
                hidden,
                "–" if tokens is None else f"{tokens:,}",
                f"{moved / 1e6:,.0f}",
                *(
                    f"{of[name].seconds * 1e6:,.1f} ({of[name].fraction_of_copy:.0%})" if name in of else "–"
                    for name in names
                ),
            )
            for (operation, direction, hidden, tokens, moved), of in lines.items()
        ],
    )
