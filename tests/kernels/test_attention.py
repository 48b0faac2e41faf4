"""Attention within a pack against one softmax in float64, forward and backward."""

import importlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lumina.kernels import (
    AttentionPlan,
    attention,
    attention_lse_backends,
)
from tests.kernels.plain import (
    assert_close_to_exact,
    evaluated,
    numbers,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# The package's attribute of this name is the operation.
attention_module = importlib.import_module("lumina.kernels.attention")


def plain_attention(q, k, v, plan):
    """One softmax over the whole pack, with minus infinity between samples."""
    heads, head_dim = q.shape[1:]
    q_sample = torch.repeat_interleave(torch.tensor(plan.query_lengths))
    k_sample = torch.repeat_interleave(torch.tensor(plan.key_lengths))
    strangers = q_sample[:, None] != k_sample[None]
    outputs = []
    for head in range(heads):
        kv_head = head * k.shape[1] // heads
        scores = q[:, head] @ k[:, kv_head].T / math.sqrt(head_dim)
        weights = scores.masked_fill(strangers, -math.inf).softmax(-1)
        outputs.append(weights @ v[:, kv_head])
    return torch.stack(outputs, 1)


PLANS = {
    "one sample": ((6,), (6,)),
    "equal lengths": ((4, 4, 4), (4, 4, 4)),
    "ragged": ((5, 1, 7, 3), (5, 1, 7, 3)),
    # Samples of one length are called together, so they must find their way back between the others.
    "ragged with equals": ((5, 3, 5, 1, 3, 5), (5, 3, 5, 1, 3, 5)),
    "equal captions": ((5, 3, 5), (4, 4, 4)),
    "unequal captions": ((5, 3, 5, 1), (2, 6, 1, 3)),
    "equal lengths, unequal captions": ((4, 4, 4), (2, 5, 1)),
    # Filled up, the keys of the first group are as many as those of the whole pack.
    "unequal captions in one group": ((4, 4, 2), (1, 3, 2)),
    "a sample without queries": ((4, 0, 2), (4, 3, 2)),
}


IMPLEMENTATIONS = {
    "reference": attention.reference,
    "sdpa": attention_module.sdpa,
    "dispatched": attention,
}


def attention_case(name, heads=4, kv_heads=4, head_dim=8):
    query_lengths, key_lengths = PLANS[name]
    plan = AttentionPlan(query_lengths, key_lengths, torch.device("cpu"))
    shapes = ((sum(query_lengths), heads), (sum(key_lengths), kv_heads), (sum(key_lengths), kv_heads))
    return [numbers(*shape, head_dim, seed=i, scale=1.5) for i, shape in enumerate(shapes)], plan


@DTYPES
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, implementation, dtype):
    for kv_heads in (4, 2, 1):
        inputs, plan = attention_case(name, kv_heads=kv_heads)
        ours = IMPLEMENTATIONS[implementation]
        assert_close_to_exact(
            lambda *a, ours=ours, plan=plan: ours(*a, plan),
            lambda *a, plan=plan: plain_attention(*a, plan),
            inputs,
            dtype,
        )


def test_the_filling_of_short_captions_gets_no_gradient_of_its_own():
    """A sample's keys fill up its own short row: their gradient is as if they were there once."""
    (q, k, v), plan = attention_case("equal lengths, unequal captions")
    v = v.requires_grad_()
    attention_module.sdpa(q, k, v, plan).sum().backward()
    # Each query spends weight one, so the gradients of a sample's values sum to its queries.
    totals = [part.sum().item() / (4 * 8) for part in v.grad.split(plan.key_lengths)]
    assert totals == pytest.approx([4, 4, 4], rel=1e-5)


def test_grouping_of_a_plan():
    plan = AttentionPlan((5, 3, 5, 0), (2, 4, 1, 3), torch.device("cpu"))
    assert plan.cu_queries.tolist() == [0, 5, 8, 13, 13]
    assert plan.cu_keys.tolist() == [0, 2, 6, 7, 10]
    assert plan.cu_queries.dtype == plan.cu_keys.dtype == torch.int32
    fives, threes = plan.groups
    assert (fives.size, threes.size) == (2, 1)
    assert fives.queries.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert fives.keys.tolist() == [0, 1, 6, 6]
    assert fives.mask.flatten().tolist() == [True, True, True, False]
    assert threes.mask is None
    order = torch.cat([fives.queries, threes.queries])
    assert order[plan.ungrouped].tolist() == list(range(13))


@pytest.mark.parametrize("name", PLANS)
def test_sdpa_gradients_by_finite_differences(name):
    inputs, plan = attention_case(name, heads=2, kv_heads=1, head_dim=2)
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *a: attention_module.sdpa(*a, plan), inputs)


REFERENCE_BACKEND = next(b for b in attention_lse_backends.BACKENDS if b.name == "reference")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", PLANS)
def test_attention_of_a_pack_with_lse(name, kv_heads):
    inputs, plan = attention_case(name, kv_heads=kv_heads)
    inputs = [x.double() for x in inputs]
    ours = evaluated(lambda *a: attention_module.with_lse(REFERENCE_BACKEND, *a, plan), inputs)
    theirs = evaluated(lambda *a: plain_attention(*a, plan), inputs)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_meetings_of_a_plan():
    plan = AttentionPlan((5, 0, 3), (2, 4, 1), torch.device("cpu"))
    assert plan.meetings == ((0, 5, 0, 2), (5, 5, 2, 6), (5, 8, 6, 7))


@DTYPES
def test_attention_with_lse_in_other_dtypes(dtype):
    """Results in the dtype of the inputs, also with recomputation, and from gradients that come heads first."""
    inputs, plan = attention_case("a sample without queries", kv_heads=2)
    exact = evaluated(lambda *a: plain_attention(*a, plan), [x.double() for x in inputs])
    backend = attention_lse_backends.lse_backend(inputs[0], "cpu_flash")

    def ours(q, k, v):
        out = checkpoint(lambda *a: attention_module.with_lse(backend, *a, plan), q, k, v, use_reentrant=False)
        return out.transpose(0, 1).contiguous().transpose(0, 1)

    found = evaluated(ours, [x.to(dtype) for x in inputs])
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == dtype
        assert float((value - truth).norm() / truth.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)
