"""What this machine reaches, for plans of runs on it: products, attention, copies."""

import functools
import os
import time
from collections.abc import Callable

import torch

from lumina.benchmark import record
from lumina.config.devices import Device
from lumina.kernels import AttentionPlan, attention
from lumina.parallel.gloo_speed import gloo_speed
from lumina.planner.cost import Speeds

_SIDE = {"cuda": 8192, "cpu": 1024}
_TOKENS = {"cuda": 16_384, "cpu": 1024}
_COPIED = {"cuda": 2**30, "cpu": 2**27}
_HEADS, _HEAD = 16, 128
_REPEATS = 3
_MESSENGERS = 8  # processes, at most, between which messages are measured


@functools.cache
def here(precision: str, per_host: int) -> tuple[Device, Speeds]:
    """This machine's device, and what one rank reaches alone; on a CPU with one thread, as ranks that share its cores.

    Messages between ranks of a CPU are measured between as many processes, which share its cores. Other links are not:
    give what `lumina benchmark network` found.
    """
    device = record.device_of(None)
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        return _measured(device, precision, per_host)
    finally:
        torch.set_num_threads(threads)


def _measured(device: torch.device, precision: str, per_host: int) -> tuple[Device, Speeds]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    side, tokens, kind = _SIDE[device.type], _TOKENS[device.type], device.type
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    gemm = 2 * side**3 / _best(lambda: torch.mm(a, b), device)
    plan = AttentionPlan((tokens,), (tokens,), device)
    q, k, v = (torch.randn(tokens, _HEADS, _HEAD, device=device).to(dtype).requires_grad_() for _ in range(3))
    flops = 4 * tokens * tokens * _HEADS * _HEAD
    forward = flops / _best(lambda: attention(q, k, v, plan), device)
    out = attention(q, k, v, plan)
    grad = torch.ones_like(out)
    backward = 2.5 * flops / _best(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device)
    source = torch.empty(_COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / _best(lambda: target.copy_(source), device)
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        name, cores, link, latency, overhead = torch.cuda.get_device_name(device), None, 50e9, 20e-6, 50e-6
    else:
        import psutil

        cores = os.cpu_count() or 1
        memory, name = psutil.virtual_memory().total // per_host, "a share of this host"
        # What a block costs in Python shows where it is small.
        link, latency, overhead = copied, 0.0, 1.5e-3
        if per_host > 1:
            # A plan has each rank's time alone, and stretches it by the ranks that take turns on a core.
            messages, in_turn = gloo_speed(min(per_host, _MESSENGERS)), max(1.0, min(per_host, _MESSENGERS) / cores)
            link, latency = messages.bandwidth * in_turn, messages.hop / in_turn
    peak = gemm / 1e12
    found = Device(name, int(memory), peak, peak, copied, link, link, copied)
    speeds = Speeds(gemm, forward, backward, copied, copied, link, link, latency, overhead, per_host, cores)
    return found, speeds


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the best of a few goes after a first."""
    best = float("inf")
    for go in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if go:
            best = min(best, time.perf_counter() - start)
    return best
