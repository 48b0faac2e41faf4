"""Operations on the tokens of a pack: parity with float64, determinism, strides, empty packs."""

import pytest
import torch

from lumina.kernels import modulated_norm, triton_support
from tests.kernels.cases import PACKED, PACKS
from tests.kernels.plain import INTERPRETED, assert_close_to_exact, evaluated, numbers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OPERATIONS = pytest.mark.parametrize("name", PACKED)


def on(device, case, dtype=torch.float32):
    return [x.to(device, dtype) for x in case.inputs]


@DTYPES
@OPERATIONS
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.usefixtures("programs")
def test_parity(name, pack, dtype, device):
    case = PACKED[name](PACKS[pack], 96, device)
    assert_close_to_exact(case.fused, case.plain, on(device, case), dtype)


@DTYPES
@OPERATIONS
@pytest.mark.parametrize("width", [1536, 3072, 4096])
def test_parity_of_shipped_widths(name, width, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_support, "programs_at_once", lambda x, each: 2)
    if INTERPRETED:  # it takes its time for each program
        monkeypatch.setattr(modulated_norm, "SUM_COLUMNS", 1024)
    case = PACKED[name]((3, 2), width, device)
    assert_close_to_exact(case.fused, case.plain, on(device, case), dtype)


@OPERATIONS
def test_weights_in_fp32_beside_bf16_tokens(name, device):
    """The modulation may be wider than the tokens; each gradient has its input's dtype."""
    case = PACKED[name]((5, 4), 96, device)
    inputs = [x.bfloat16() if len(x) == 9 else x for x in on(device, case)]
    ours, theirs = evaluated(case.fused, inputs), evaluated(lambda *a: case.call(case.operation.reference, *a), inputs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-5)


@OPERATIONS
@pytest.mark.usefixtures("programs")
def test_two_runs_are_equal_in_every_bit(name, device):
    case = PACKED[name](PACKS["ragged"], 96, device)
    first, second = (evaluated(case.fused, on(device, case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@OPERATIONS
def test_strided_inputs(name, device):
    case = PACKED[name](PACKS["ragged"], 96, device)
    inputs = on(device, case)
    expected = evaluated(case.fused, [x.contiguous() for x in inputs])

    def strided(x):
        """Rows of a wider tensor, the columns of a longer one."""
        return torch.cat((x, x), -1)[..., : x.shape[-1]], torch.stack((x, x), -1)[..., 0]

    for i in range(2):
        views = [strided(x)[i].detach().requires_grad_() for x in inputs]
        assert any(not x.is_contiguous() for x in views)
        outputs = case.fused(*views)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # Gradients may come strided too.
        cotangents = [numbers(*out.shape, seed=99 + j).to(device).T.contiguous().T for j, out in enumerate(outputs)]
        found = [*outputs, *torch.autograd.grad(outputs, views, cotangents)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@OPERATIONS
def test_an_empty_pack(name, device):
    case = PACKED[name]((0, 0), 96, device)
    for found, expected in zip(
        evaluated(case.fused, on(device, case)),
        evaluated(lambda *a: case.call(case.operation.reference, *a), on(device, case)),
        strict=True,
    ):
        assert torch.equal(found, expected)


@OPERATIONS
def test_one_gradient_alone(name, device):
    """Whatever else takes no gradient; and of two results one may be left."""
    case = PACKED[name]((3, 4), 96, device)
    inputs = on(device, case)
    for i in range(len(inputs)):
        moved = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        results = []
        for f in (case.operation.named("triton"), case.operation.reference):
            out = case.call(f, *moved)
            out = out if isinstance(out, torch.Tensor) else out[1]
            results.append(torch.autograd.grad(out.sum(), moved[i])[0])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
