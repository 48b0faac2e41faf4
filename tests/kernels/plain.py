"""The formulas of the fused operations, written out in plain torch, and the rule by which results are judged.

The rule: an error of at most twice that of the plain formula in the same dtype and a few units in the last place of
the largest value.
"""

import torch

from lumina.kernels import triton_support

INTERPRETED = triton_support.triton is not None and triton_support.triton.knobs.runtime.interpret

# The interpreter's casts to bf16 truncate.
FEW_ULP = {torch.float32: 4, torch.bfloat16: 1 if INTERPRETED or not torch.cuda.is_available() else 0.25}


def numbers(*shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def evaluated(function, inputs):
    """The outputs of `function`, and the gradient of each input under a fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [numbers(*out.shape, seed=99 + i).to(out.device, out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [*(out.detach() for out in outputs), *gradients]


def assert_close_to_exact(ours, plain, inputs, dtype):
    inputs = [x.to(dtype) for x in inputs]
    exact = evaluated(plain, [x.double() for x in inputs])
    baseline = evaluated(plain, inputs)
    found = evaluated(ours, inputs)
    assert len(found) == len(exact)
    for i, (value, base, truth) in enumerate(zip(found, baseline, exact, strict=True)):
        assert value.dtype == dtype
        assert value.shape == truth.shape
        error, allowed = (value - truth).abs().max(), 2 * (base - truth).abs().max()
        allowed = allowed + FEW_ULP[dtype] * torch.finfo(dtype).eps * truth.abs().max()
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


# The formulas, written out. Each works in the dtype of its inputs.


def plain_rms_norm(x, weight, eps=1e-5):
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()


def plain_modulated(normed, scale, shift, sample_id):
    return torch.stack([row * (1 + scale[i]) + shift[i] for row, i in zip(normed, sample_id.tolist(), strict=True)])


def plain_rotated(x_tw, cos, sin):
    """The rotation of each pair as a 2 × 2 matrix."""
    matrices = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).to(x_tw.dtype)
    pairs = x_tw.reshape(len(x_tw), -1, cos.shape[-1], 2)
    return torch.einsum("tiab,thib->thia", matrices, pairs).flatten(-2)


def plain_gated_sum(x, gate, y, sample_id):
    rows = zip(x, y, sample_id.tolist(), strict=True)
    return torch.stack([x_row + gate[i] * y_row for x_row, y_row, i in rows])


def plain_swiglu(a, b):
    return a / (1 + (-a).exp()) * b
