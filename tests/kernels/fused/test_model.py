"""The model and the ring with the Triton kernels, against the same with the references."""

import pytest
import torch

from lumina import FlagDiT, FlagDiTConfig, kernels
from lumina.kernels import triton_support
from lumina.kernels.dispatch import Operation
from lumina.parallel.ring import in_process_ring
from tests.kernels.plain import INTERPRETED, numbers

SMALL = {"dim": 96, "n_layers": 2, "n_heads": 4, "multiple_of": 32}
CONFIGS = {
    "text": FlagDiTConfig(**SMALL, cap_feat_dim=24, n_kv_heads=2, frames=True),
    "labels, no norm of keys and queries": FlagDiTConfig(**SMALL, num_classes=5, qk_norm=False),
}
LAUNCHED = {
    "modulated_norm_forward",
    "modulated_norm_backward",
    "sum_over_chunks",
    "gated_residual_forward",
    "gated_residual_backward",
    "swiglu_forward",
    "swiglu_backward",
    "qk_norm_rope_forward",
    "qk_norm_rope_backward",
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched. In the interpreter, where nothing is on CUDA, Triton is preferred too."""
    names, launch = [], triton_support.launch

    def spy(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    def prefer_triton(operation, tensor):
        known = {name for name, _, _ in operation._implementations}
        name = "triton" if "triton" in known else "sdpa" if "sdpa" in known else "reference"
        return name, operation.named(name)

    monkeypatch.setattr(triton_support, "launch", spy)
    monkeypatch.setattr(triton_support, "programs_at_once", lambda x, each: 3)
    if INTERPRETED:
        monkeypatch.setattr(Operation, "_choice", prefer_triton)
    return names


def built(config, device, dtype):
    torch.manual_seed(0)
    model = FlagDiT(config)
    with torch.no_grad():  # or the gates of a new model are zero, and its norms' parameters all one
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(numbers(*parameter.shape, seed=i, scale=0.05))
    return model.to(device, dtype)


def conditions(config, device, dtype):
    samples = [
        numbers(*shape, seed=20 + i).to(device, dtype) for i, shape in enumerate([(4, 6, 4), (4, 2, 2), (2, 4, 4, 2)])
    ]
    if not config.frames:
        samples = [x if x.ndim == 3 else x[0] for x in samples]
    t = torch.tensor([0.1, 0.5, 0.9], device=device)
    if config.num_classes is not None:
        return (samples, t), {"labels": torch.tensor([0, 3, 5], device=device)}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], device=device)
    return (samples, t, numbers(3, 5, config.cap_feat_dim, seed=30).to(device, dtype), mask), {}


def results(config, device, dtype):
    """Velocities of three samples of unequal shapes, and the gradient of every parameter."""
    model = built(config, device, dtype)
    args, named = conditions(config, device, dtype)
    velocities = model(*args, **named)
    sum((v.float().square().mean() for v in velocities), torch.zeros((), device=device)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"velocity {i}": v.detach() for i, v in enumerate(velocities)} | grads


def with_references(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(Operation, "_choice", lambda operation, tensor: ("reference", operation.reference))
        return results(*arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_in_fp32(name, device, launched, monkeypatch):
    config = CONFIGS[name]
    expected = with_references(monkeypatch, config, device, torch.float32)
    assert not launched
    found = results(config, device, torch.float32)
    assert set(launched) == LAUNCHED
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3)  # the gradient of ky_norm.bias is zero: no softmax depends on it
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("launched")
def test_the_model_in_bf16(name, device, monkeypatch):
    """At most twice as far from float64 as the references in bf16, and a unit in the last place.

    The interpreter's casts truncate.
    """
    config = CONFIGS[name]
    exact = with_references(monkeypatch, config, device, torch.float64)
    base = with_references(monkeypatch, config, device, torch.bfloat16)
    found = results(config, device, torch.bfloat16)

    def error(of):
        return {key: float((of[key].double() - exact[key]).norm() / exact[key].norm()) for key in exact}

    ours, theirs = error(found), error(base)
    for key in exact:
        if not key.endswith("ky_norm.bias"):  # no softmax depends on it: its gradient is zero
            assert ours[key] <= 2 * theirs[key] + 2**-7, f"{key}: {ours[key]:.2e}, the reference {theirs[key]:.2e}"


def test_training_steps(device, launched, monkeypatch):
    """Ten steps of AdamW go the same way."""
    config = CONFIGS["text"]

    def losses():
        model = built(config, device, torch.float32)
        args, named = conditions(config, device, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(10 if not INTERPRETED else 3):
            loss = sum((v - x).square().mean() for v, x in zip(model(*args, **named), args[0], strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Operation, "_choice", lambda operation, tensor: ("reference", operation.reference))
        expected = losses()
    assert not launched
    found = losses()
    assert launched
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0]


def test_the_ring(device, launched):
    """Three blocks, merged by the kernel, are one."""
    lengths = (5, 9, 3)
    q, k, v, grad_out = (numbers(sum(lengths), heads, 24, seed=i).to(device) for i, heads in enumerate((4, 2, 2, 4)))

    def through(blocks):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = in_process_ring(*leaves, lengths, blocks)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    one = through(1)
    assert not launched
    three = through(3)
    assert set(launched) == {"merge_attention_in_place"}
    for found, expected in zip(three, one, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert kernels.merge_attention.chosen(q) == "triton"
