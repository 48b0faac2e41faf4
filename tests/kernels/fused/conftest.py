"""Tests of the Triton kernels themselves: collected on a GPU, and in the interpreter (see test_interpreter.py)."""

import pytest
import torch

from lumina.kernels import triton_support
from lumina.kernels.registration import FUSED, TRITON
from tests.kernels.plain import INTERPRETED

collect_ignore_glob = ["test_large.py"] if INTERPRETED else [] if torch.cuda.is_available() else ["*"]

if INTERPRETED:
    for name, op in FUSED.items():
        op.register_kernel("cpu")(TRITON[name])


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            if item.path.parent.name == "fused":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory holds NaN, so that what a kernel does not write is seen."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(params=[1, 4, 1000], ids=lambda n: f"{n} programs")
def programs(request, monkeypatch):
    """How many programs a backward pass is cut for: chunks of all tokens, of some, of one."""
    monkeypatch.setattr(triton_support, "programs_at_once", lambda x, each: request.param)
    return request.param
