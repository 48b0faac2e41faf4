"""Every kernel of every shipped model is compiled for three generations of GPUs, none of which need be there."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lumina.kernels import triton_support
from lumina.kernels.registration import FUSED, TRITON
from tests.kernels.shipped import MODELS, Model, run

if triton_support.triton is None:
    pytest.skip("Triton is for Linux", allow_module_level=True)

from tests.kernels.aot import compiled, recorded

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The most a program may have, in bytes."""


@functools.cache
def launches(dtype, capability, models):
    """What the models launch there, each launch but once, with the first model that makes it."""
    found = {}
    for model in models:
        with recorded(pytest.MonkeyPatch()) as made, pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_support, "shared_memory", lambda device: SHARED[capability])
            run(model, dtype)
        for launch in made:
            found.setdefault(launch, model.name)
    return found


def test_every_op_is_among_them(monkeypatch):
    called = set()
    for name, function in TRITON.items():
        monkeypatch.setitem(TRITON, name, lambda *a, name=name, f=function: (called.add(name), f(*a))[1])
    with recorded(pytest.MonkeyPatch()):
        for model in MODELS:
            run(model, torch.bfloat16)
    assert called == FUSED.keys()


def table(dtype, capability, models):
    """Markdown, a line a kernel; and the lines of those that break a limit."""
    found = launches(dtype, capability, models)
    with ThreadPoolExecutor(2) as pool:
        costs = list(pool.map(lambda launch: compiled(launch, capability), found))
    lines, broken = [], []
    for (launch, model), cost in zip(found.items(), costs, strict=True):
        threads = 32 * launch.warps
        resident = min(65536 // (cost.registers * threads), SHARED[capability] // max(cost.shared, 1), 2048 // threads)
        columns = (launch.name, model, launch.warps, cost.registers, cost.spills, cost.shared, resident)
        lines.append("| " + " | ".join(map(str, (*columns, cost.load_bits, cost.store_bits))) + " |")
        if cost.spills or cost.shared > SHARED[capability] or cost.load_bits < 128:
            broken.append(lines[-1])
    return lines, broken


HEAD = (
    "| kernel | first used by | warps | registers | spilled | shared | programs | load | store |\n" + "|---" * 9 + "|"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(capability, dtype) for dtype in (torch.bfloat16, torch.float32) for capability in (80, 90, 100)],
)
def test_what_kernels_cost(capability, dtype, capsys):
    """Nothing is spilled, shared memory suffices, and tokens are loaded 128 bits at a time."""
    lines, broken = table(dtype, capability, MODELS if dtype == torch.bfloat16 else MODELS[:1] + MODELS[2:3])
    with capsys.disabled():
        print(f"\n\nsm_{capability}, {dtype}\n\n{HEAD}", *lines, sep="\n")
    assert broken == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_other_widths_and_cards_have_shared_memory_enough(capability, dtype):
    """The widest rows that kernels take, and cards with little shared memory: registers may spill there."""
    models = (Model("widest", triton_support.WIDEST, 64, 64, 128, 22016), MODELS[2])
    found = launches(dtype, capability, models)
    with ThreadPoolExecutor(2) as pool:
        costs = list(pool.map(lambda launch: compiled(launch, capability), found))
    short = [launch.name for launch, cost in zip(found, costs, strict=True) if cost.shared > SHARED[capability]]
    assert short == []
