"""SwiGLU of two tensors and of one that holds both."""

import pytest
import torch

from tests.kernels.cases import swiglu, swiglu_packed
from tests.kernels.plain import assert_close_to_exact, evaluated

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMS = pytest.mark.parametrize("make", [swiglu, swiglu_packed])


def on(device, case):
    return [x.to(device) for x in case.inputs]


@DTYPES
@FORMS
@pytest.mark.parametrize("width", [1, 96, 4096, 11008])
def test_parity(make, width, dtype, device):
    case = make(3, width)
    assert_close_to_exact(case.fused, case.plain, on(device, case), dtype)


@FORMS
def test_far_values(make, device):
    """Where the exponential overflows the limit is right, forward and backward."""
    case = make(4, 8)
    inputs = [x * 1000 for x in on(device, case)]
    ours = evaluated(case.fused, inputs)
    theirs = evaluated(lambda *a: case.call(case.operation.reference, *a), [x.double() for x in inputs])
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@FORMS
def test_strides_and_bits(make, device):
    case = make(4, 96)
    inputs = on(device, case)
    expected = evaluated(case.fused, inputs)
    for views in ([torch.cat((x, x), -1)[..., : x.shape[-1]] for x in inputs], [x.mT.contiguous().mT for x in inputs]):
        views = [x.detach().requires_grad_() for x in views]
        out = case.fused(*views)
        (cotangent,) = [torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(device)]
        found = [out, *torch.autograd.grad(out, views, cotangent.mT.contiguous().mT)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@FORMS
@pytest.mark.parametrize(("tokens", "width"), [(0, 96), (4, 0)])
def test_nothing(make, tokens, width, device):
    case = make(tokens, width)
    assert all(x.numel() == 0 for x in evaluated(case.fused, on(device, case)))


def test_shapes_that_do_not_go_together(device):
    case = swiglu(4, 95)
    a, b = on(device, case)
    for f in (case.operation.named("triton"), case.operation.reference):
        with pytest.raises(ValueError, match=r"one shape, not \(4, 95\) and \(4, 94\)"):
            f(a, b[:, 1:])
        with pytest.raises(ValueError, match="halves its last dim, which is 95"):
            f(a)
