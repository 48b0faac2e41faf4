"""Timing of a call: device time on CUDA, wall-clock time on a CPU."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3
_BUDGET = 0.3  # seconds that the repetitions of a call may take together
_FEWEST, _MOST = 5, 50
_FASTEST_CLOCK = 4e9  # Hz; a slower device sleeps longer than asked for, which does no harm
COPIED = {"cuda": 2**31, "cpu": 2**28}
"""Bytes that the measurement of the copy bandwidth reads, and writes."""


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over repetitions, the first few not counted.

    On CUDA, of the time from the call's first kernel to its last: the device is kept busy until the host has queued
    all repetitions, so that the host's own time does not show, and before each, other memory is read until the
    second-level cache holds nothing of the call's.
    """
    for _ in range(_WARM_UP):
        call()
    return _device_seconds(call, device) if device.type == "cuda" else _wall_seconds(call)


def _repeats(once: float) -> int:
    return max(_FEWEST, min(_MOST, int(_BUDGET / max(once, 1e-9))))


def _wall_seconds(call: Callable[[], object]) -> float:
    times: list[float] = []
    while len(times) < _repeats(times[0] if times else 1.0):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _device_seconds(call: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        repeats = _repeats(time.perf_counter() - start)
        cache = torch.zeros(
            torch.cuda.get_device_properties(device).L2_cache_size, device=device
        )  # four times as large
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(int((queued * repeats + 1e-3) * _FASTEST_CLOCK))
        for begin, end in events:
            cache.sum()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that torch's copy of a large tensor moves, those read and those written counted."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def forward_and_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], device: torch.device
) -> tuple[float, float]:
    """Seconds of ``function(*inputs)``, ready to be differentiated, and of its backward pass to all inputs."""
    forward = seconds(lambda: function(*inputs), device)
    outputs = function(*inputs)
    cotangents = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
    backward = seconds(lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True), device)
    return forward, backward
