"""Every operation but attention against its formula in float64, forward and backward."""

import math

import pytest
import torch

from lumina.kernels import (
    gated_residual,
    layer_norm_modulate,
    qk_norm_rope,
    rms_norm,
    rms_norm_modulate,
    swiglu,
)
from tests.kernels.plain import (
    assert_close_to_exact,
    numbers,
    plain_gated_sum,
    plain_layer_norm,
    plain_modulated,
    plain_rms_norm,
    plain_rotated,
    plain_swiglu,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


LENGTHS = (5, 1, 7, 3)


TOKENS, WIDTH, SAMPLES = sum(LENGTHS), 24, len(LENGTHS)


SAMPLE_ID = torch.repeat_interleave(torch.tensor(LENGTHS))


def assert_rounded_once(found, exact):
    """Each element is the exact one to bf16's half ulp, and a hair for what fp32 does on the way."""
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert ((found.double() - exact).abs() <= 0.51 * ulp + 2e-6).all()


@DTYPES
def test_rms_norm(dtype):
    x, weight = numbers(TOKENS, WIDTH, seed=0, scale=3), numbers(WIDTH, seed=1)
    assert_close_to_exact(lambda *a: rms_norm(*a, 1e-5), plain_rms_norm, [x, weight], dtype)


def test_rms_norm_uses_eps():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), 3e-6), torch.full((1, 4), 0.5))


@DTYPES
def test_rms_norm_modulate(dtype):
    inputs = [
        numbers(TOKENS, WIDTH, seed=0, scale=3),
        numbers(WIDTH, seed=1),
        numbers(SAMPLES, WIDTH, seed=2),
        numbers(SAMPLES, WIDTH, seed=3),
    ]

    def plain(x, weight, scale, shift):
        return plain_modulated(plain_rms_norm(x, weight), scale, shift, SAMPLE_ID)

    assert_close_to_exact(lambda *a: rms_norm_modulate(*a, SAMPLE_ID, 1e-5), plain, inputs, dtype)


@DTYPES
def test_layer_norm_modulate(dtype):
    inputs = [numbers(TOKENS, WIDTH, seed=0) + 2, numbers(SAMPLES, WIDTH, seed=1), numbers(SAMPLES, WIDTH, seed=2)]

    def plain(x, scale, shift):
        return plain_modulated(plain_layer_norm(x, 1e-6), scale, shift, SAMPLE_ID)

    assert_close_to_exact(lambda *a: layer_norm_modulate(*a, SAMPLE_ID, 1e-6), plain, inputs, dtype)


def test_layer_norm_modulate_uses_eps():
    x = torch.tensor([[1e-3, -1e-3]])
    zeros = torch.zeros(1, 2)
    out = layer_norm_modulate(x, zeros, zeros, torch.tensor([0]), 3e-6)
    torch.testing.assert_close(out, torch.tensor([[0.5, -0.5]]))


@DTYPES
def test_gated_residual(dtype):
    inputs = [numbers(TOKENS, WIDTH, seed=0), numbers(SAMPLES, WIDTH, seed=1), numbers(TOKENS, WIDTH, seed=2)]

    assert_close_to_exact(
        lambda *a: gated_residual(*a, SAMPLE_ID), lambda *a: plain_gated_sum(*a, SAMPLE_ID), inputs, dtype
    )


@DTYPES
def test_swiglu(dtype):
    inputs = [numbers(TOKENS, WIDTH, seed=0, scale=4), numbers(TOKENS, WIDTH, seed=1)]
    assert_close_to_exact(swiglu, plain_swiglu, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope(dtype, kv_heads, normed):
    heads, head_dim = 4, 6
    q_width, k_width = heads * head_dim, kv_heads * head_dim
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3, 0.01])
    cos, sin = angles.cos(), angles.sin()
    inputs = [numbers(TOKENS, q_width, seed=0) + 1, numbers(TOKENS, k_width, seed=1) - 1]
    if normed:
        inputs += [numbers(width, seed=2 + i) for i, width in enumerate((q_width, q_width, k_width, k_width))]

    def ours(q, k, *affine):
        return qk_norm_rope(q, k, *(affine or [None] * 4), cos, sin)

    def plain(q, k, *affine):
        if affine:
            q = plain_layer_norm(q, 1e-5) * affine[0] + affine[1]
            k = plain_layer_norm(k, 1e-5) * affine[2] + affine[3]
        return plain_rotated(q, cos, sin), plain_rotated(k, cos, sin)

    assert_close_to_exact(ours, plain, inputs, dtype)


def test_norms_round_once_whatever_the_dtype():
    """fp32 inside: a bf16 result is the exact one rounded, not one that lost bits at every operation."""
    x, weight, bias = (y.bfloat16() for y in (numbers(50, 64, seed=0), numbers(64, seed=1), numbers(64, seed=2)))
    assert_rounded_once(rms_norm(x, weight, 1e-5), plain_rms_norm(x.double(), weight.double()))
    angles = torch.arange(50)[:, None] * 0.37 * torch.ones(8)
    q, _ = qk_norm_rope(x, x, weight, bias, weight, bias, angles.cos(), angles.sin())
    exact = plain_layer_norm(x.double(), 1e-5) * weight.double() + bias.double()
    assert_rounded_once(q, plain_rotated(exact, angles.cos().double(), angles.sin().double()))


def test_elementwise_gradients_by_finite_differences():
    a, b = (numbers(4, 3, seed=i).double().requires_grad_() for i in range(2))
    gate = numbers(2, 3, seed=2).double().requires_grad_()
    ids = torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(swiglu, (a, b))
    assert torch.autograd.gradcheck(lambda *x: gated_residual(*x, ids), (a, gate, b))


COS = SIN = torch.full((4, 2), math.sqrt(0.5))


IDS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda *a: rms_norm(*a, 1e-5), [(4, 8), (8,)]),
        (lambda *a: rms_norm_modulate(*a, IDS, 1e-5), [(4, 8), (8,), (2, 8), (2, 8)]),
        (lambda *a: layer_norm_modulate(*a, IDS, 1e-6), [(4, 8), (2, 8), (2, 8)]),
        (lambda *a: torch.cat(qk_norm_rope(*a, COS, SIN), 1), [(4, 8), (4, 4), (8,), (8,), (4,), (4,)]),
    ],
    ids=["rms_norm", "rms_norm_modulate", "layer_norm_modulate", "qk_norm_rope"],
)
def test_fp32_gradients_by_finite_differences(function, shapes):
    """These work in fp32 whatever they are given, too coarse for gradcheck: a wide step along random directions."""
    inputs = [numbers(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    out = function(*inputs)
    cotangent = numbers(*out.shape, seed=50)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    step = 2e-3
    for i, gradient in enumerate(gradients):
        direction = numbers(*shapes[i], seed=70 + i)
        ends = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step * direction if j == i else x.detach() for j, x in enumerate(inputs)]
            ends.append((function(*moved).double() * cotangent).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = (gradient * direction).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=2e-3, abs=2e-3)
