"""Sizes at which 32-bit indices overflow: on a GPU alone.

A few rows, the last among them, are compared with the reference on those rows; sums over all tokens with exact ones of
inputs for which these are known.
"""

import pytest
import torch

from lumina import kernels
from tests.kernels.cases import qk_norm_rope

TOKENS = 131072
MANY = 600_000  # of 4096: 2.4 · 10⁹ elements
ROWS = slice(TOKENS - 64, TOKENS)


def normal(*shape, dtype=torch.bfloat16):
    torch.manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, device="cuda", dtype=dtype)


def leaf(x):
    return x.detach().requires_grad_()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_swiglu_of_131072_by_11008_in_one_tensor():
    ab = leaf(normal(TOKENS, 22016))
    assert ab.numel() > 2**31
    out = kernels.swiglu(ab)
    (grad,) = torch.autograd.grad(out, ab, out.detach())
    rows = leaf(ab[ROWS])
    expected = kernels.swiglu.reference(rows)
    close(out[ROWS], expected)
    close(grad[ROWS], torch.autograd.grad(expected, rows, expected.detach())[0])


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
def test_norm_and_residual(tokens):
    lengths = torch.tensor([tokens // 2 - 5, 6, tokens - tokens // 2 - 1], device="cuda")
    ids = torch.repeat_interleave(lengths)
    x, y = leaf(normal(tokens, 4096)), leaf(normal(tokens, 4096))
    weight, (gate, scale, shift) = leaf(normal(4096)), [leaf(part) for part in normal(3, 3 * 4096).chunk(3, -1)]
    inputs = [x, gate, y, weight, scale, shift]
    outputs = kernels.gated_residual_norm(*inputs, ids, 1e-5)
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
    rows = slice(tokens - 64, tokens)
    few = [leaf(x[rows]), leaf(gate), leaf(y[rows]), leaf(weight), leaf(scale), leaf(shift)]
    expected = kernels.gated_residual_norm.reference(*few, ids[rows], 1e-5)
    of_few = torch.autograd.grad(expected, few, [torch.ones_like(out) for out in expected])
    for found, truth in zip((*outputs, grads[0], grads[2]), (*expected, of_few[0], of_few[2]), strict=True):
        close(found[rows], truth)
    assert torch.equal(grads[5], lengths[:, None].expand(3, 4096).to(torch.bfloat16))  # of shift: a one a token
    again = torch.autograd.grad(kernels.gated_residual_norm(*inputs, ids, 1e-5), inputs, [torch.ones_like(x)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


LAST = slice(MANY - 64, MANY)


def of_the_last_rows(operation, inputs, tokenwise, *more):
    """Results of `operation` on the last rows of `inputs`, from all of them and from these alone: (found, expected)."""
    outputs = operation(*inputs, *more)
    grads = torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))
    found = [outputs[LAST], *(grads[i][LAST] for i in tokenwise)]
    few = [leaf(x[LAST]) if i in tokenwise else leaf(x) for i, x in enumerate(inputs)]
    more = [x[LAST] if isinstance(x, torch.Tensor) else x for x in more]
    outputs = operation.reference(*few, *more)
    grads = torch.autograd.grad(outputs, few, torch.ones_like(outputs))
    return zip(found, [outputs, *(grads[i] for i in tokenwise)], strict=True)


def test_the_other_norms_and_residuals():
    ids = torch.arange(3, device="cuda").repeat_interleave(MANY // 3)
    x, y = leaf(normal(MANY, 4096)), leaf(normal(MANY, 4096))
    weight, (gate, scale, shift) = leaf(normal(4096)), [leaf(part) for part in normal(3, 3 * 4096).chunk(3, -1)]
    for operation, inputs, tokenwise, eps in (
        (kernels.rms_norm_modulate, [x, weight, scale, shift], [0], [1e-5]),
        (kernels.layer_norm_modulate, [x, scale, shift], [0], [1e-6]),
        (kernels.gated_residual, [x, gate, y], [0, 2], []),
    ):
        for found, expected in of_the_last_rows(operation, inputs, tokenwise, ids, *eps):
            close(found, expected)


def test_swiglu_of_two_tensors():
    a, b = leaf(normal(MANY, 4096)), leaf(normal(MANY, 4096))
    for found, expected in of_the_last_rows(kernels.swiglu, [a, b], [0, 1]):
        close(found, expected)


def test_qk_norm_rope_of_gradients_that_come_heads_first():
    """Each head's gradients lie together, as attention gives them: the last head begins beyond 2³¹ elements."""
    q = leaf(normal(MANY, 4096))
    angles = torch.arange(MANY, device="cuda")[:, None] * torch.logspace(0, -4, 64, device="cuda")
    weight, bias = (normal(4096) for _ in range(2))
    k, few = normal(MANY, 128), leaf(q[LAST])
    of_k = (weight[:128], bias[:128])
    out, _ = kernels.qk_norm_rope(q, k, weight, bias, *of_k, angles.cos(), angles.sin())
    cotangent = normal(32, MANY, 128).transpose(0, 1)
    (grad,) = torch.autograd.grad(out, q, cotangent)
    rotation = (angles[LAST].cos(), angles[LAST].sin())
    expected, _ = kernels.qk_norm_rope.reference(few, k[LAST], weight, bias, *of_k, *rotation)
    close(out[LAST], expected)
    close(grad[LAST], torch.autograd.grad(expected, few, cotangent[LAST])[0])


@pytest.mark.parametrize(("heads", "head_dim"), [(32, 48), (32, 96), (32, 128)])
def test_qk_norm_rope(heads, head_dim):
    case = qk_norm_rope(TOKENS, heads, heads, head_dim, device="cuda")
    inputs = [leaf(x.cuda().bfloat16()) for x in case.inputs]
    outputs = case.call(kernels.qk_norm_rope, *inputs)
    expected = case.call(kernels.qk_norm_rope.reference, *inputs)
    cotangents = [normal(*out.shape) for out in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, inputs, cotangents)]
    truths = [*expected, *torch.autograd.grad(expected, inputs, cotangents)]
    for value, truth in zip(found[:4], truths[:4], strict=True):
        close(value, truth)
    for value, truth in zip(found[4:], truths[4:], strict=True):
        torch.testing.assert_close(value, truth, rtol=2**-6, atol=2.0)  # sums of 131,072


def test_merge_attention():
    out, block = normal(TOKENS, 32, 128, dtype=torch.float32), normal(TOKENS, 32, 128)
    lse, block_lse = normal(TOKENS, 32, dtype=torch.float32), normal(32, TOKENS, dtype=torch.float32).T
    expected, expected_lse = out.clone(), lse.clone()
    kernels.merge_attention.reference(expected, expected_lse, block, block_lse)
    kernels.merge_attention(out, lse, block, block_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_what_runs_on_a_gpu():
    x = torch.ones(2, 96, device="cuda")
    for name in (
        "rms_norm_modulate",
        "layer_norm_modulate",
        "gated_residual",
        "gated_residual_norm",
        "swiglu",
        "qk_norm_rope",
    ):
        assert getattr(kernels, name).chosen(x) == "triton"
        assert getattr(kernels, name).chosen(x.double()) == "reference"
