"""KQ-norm and RoPE: head dims, grouped queries, moments from outside."""

import pytest
import torch

from lumina import kernels
from lumina.kernels import triton_support
from tests.kernels.cases import qk_norm_rope
from tests.kernels.plain import assert_close_to_exact, evaluated, numbers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMS = pytest.mark.parametrize(
    "form", [{}, {"shared": True}, {"normed": False}], ids=["normed", "moments from outside", "not normed"]
)


def on(device, case):
    return [x.to(device) for x in case.inputs]


@DTYPES
@FORMS
@pytest.mark.usefixtures("programs")
def test_parity(form, dtype, device):
    case = qk_norm_rope(9, **form, device=device)
    assert_close_to_exact(case.fused, case.plain, on(device, case), dtype)


@DTYPES
@FORMS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 32, 48), (16, 4, 48), (12, 12, 72), (4, 1, 72), (32, 32, 96), (32, 8, 96), (32, 32, 128), (32, 8, 128)],
)
def test_parity_of_shipped_heads(heads, kv_heads, head_dim, form, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_support, "programs_at_once", lambda x, each: 2)
    case = qk_norm_rope(3, heads, kv_heads, head_dim, **form, device=device)
    assert_close_to_exact(case.fused, case.plain, on(device, case), dtype)


@FORMS
@pytest.mark.usefixtures("programs")
def test_two_runs_are_equal_in_every_bit(form, device):
    case = qk_norm_rope(9, **form, device=device)
    first, second = (evaluated(case.fused, on(device, case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@FORMS
def test_strided_inputs_and_gradients(form, device):
    case = qk_norm_rope(5, **form, device=device)
    inputs = on(device, case)
    expected = evaluated(case.fused, inputs)
    q, k, *affine = inputs
    both = torch.cat((q, k), -1)
    slices = [both[:, : q.shape[1]], both[:, q.shape[1] :]]
    transposed = [q.T.contiguous().T, k.T.contiguous().T]
    for q, k in (slices, transposed):
        views = [x.detach().requires_grad_() for x in (q, k, *affine)]
        outputs = case.fused(*views)
        # Attention gives gradients with heads outermost.
        cotangents = [
            numbers(*out.shape, seed=99 + i).to(device).transpose(0, 1).contiguous().transpose(0, 1)
            for i, out in enumerate(outputs)
        ]
        found = [*outputs, *torch.autograd.grad(outputs, views, cotangents)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@FORMS
def test_no_tokens(form, device):
    case = qk_norm_rope(0, **form, device=device)
    ours = evaluated(case.fused, on(device, case))
    theirs = evaluated(lambda *a: case.call(case.operation.reference, *a), on(device, case))
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


class Ranks:
    """Two ranks that share the width, one after another: each is told what the other said the run before."""

    def __init__(self):
        self.said = {}

    def of(self, rank):
        class Rank:
            def moments(_, local):
                self.said["moments", rank] = local
                means, variances = ([self.said.get(("moments", r), local)[i::2] for r in range(2)] for i in range(2))
                mean = (means[0] + means[1]) / 2
                variance = (variances[0] + variances[1]) / 2 + ((means[0] - means[1]) / 2) ** 2
                return torch.stack((mean, variance), 1).flatten(0, 1)

            def means(_, local):
                self.said["means", rank] = local
                return (self.said.get(("means", 0), local) + self.said.get(("means", 1), local)) / 2

        return Rank()


def test_two_ranks_make_the_whole(device):
    """Each with half of the heads: outputs and gradients are slices of those of one process."""
    case = qk_norm_rope(6, heads=4, kv_heads=2, head_dim=24, device=device)
    expected = evaluated(case.fused, on(device, case))
    ranks, halves = Ranks(), [[x.chunk(2, -1)[rank].contiguous() for x in on(device, case)] for rank in range(2)]
    angles = torch.arange(6)[:, None] * torch.logspace(0, -2, 12) + 40.0
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    for _ in range(3):  # moments, then means, then both are known to all
        found = []
        for rank in range(2):
            leaves = [x.requires_grad_() for x in halves[rank]]
            q, k = kernels.qk_norm_rope.named("triton")(*leaves, cos, sin, ranks.of(rank))
            cotangents = [numbers(6, 4 // (i + 1), 24, seed=99 + i).to(device).chunk(2, 1)[rank] for i in range(2)]
            grads = torch.autograd.grad((q, k), leaves, cotangents)
            found.append([q, k, *grads])
    for i, whole in enumerate(expected):
        torch.testing.assert_close(
            torch.cat([found[0][i], found[1][i]], 1 if i < 2 else -1), whole, rtol=1e-4, atol=1e-5
        )
