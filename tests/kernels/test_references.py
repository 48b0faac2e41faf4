"""Every operation against its formula in float64, forward and backward, and who is chosen to run it."""

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lumina.kernels import (
    AttentionPlan,
    attention,
    attention_lse_backends,
    gated_residual,
    gated_residual_norm,
    layer_norm_modulate,
    merge_attention,
    optional,
    qk_norm_rope,
    rms_norm,
    rms_norm_modulate,
    swiglu,
)
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.kernels.dispatch import Operation
from tests.kernels.plain import (
    assert_close_to_exact,
    evaluated,
    numbers,
    plain_gated_sum,
    plain_layer_norm,
    plain_modulated,
    plain_rms_norm,
    plain_rotated,
    plain_swiglu,
)

# The package's attribute of this name is the operation.
attention_module = importlib.import_module("lumina.kernels.attention")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LENGTHS = (5, 1, 7, 3)
TOKENS, WIDTH, SAMPLES = sum(LENGTHS), 24, len(LENGTHS)
SAMPLE_ID = torch.repeat_interleave(torch.tensor(LENGTHS))


def assert_rounded_once(found, exact):
    """Each element is the exact one to bf16's half ulp, and a hair for what fp32 does on the way."""
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    assert ((found.double() - exact).abs() <= 0.51 * ulp + 2e-6).all()


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


# Who runs it.


def test_the_first_usable_implementation_runs():
    @Operation
    def doubled(x):
        """Twice x."""
        return "reference"

    @doubled.implementation("for rows", usable=lambda x: x.dim() == 1)
    def _rows(x):
        return "for rows"

    @doubled.implementation("for floats", usable=lambda x: x.is_floating_point())
    def _floats(x):
        return "for floats"

    cases = {
        "for rows": torch.ones(2),  # both can; the first registered is preferred
        "for floats": torch.ones(2, 2),
        "reference": torch.ones(2, 2, dtype=torch.int64),
    }
    for name, tensor in cases.items():
        assert doubled.chosen(tensor) == doubled(tensor) == name
    assert (doubled.name, doubled.__name__, doubled.__doc__) == ("doubled", "doubled", "Twice x.")
    assert _rows(torch.ones(2, 2)) == "for rows"


def test_other_arguments_are_passed_on():
    @Operation
    def scaled(x, factor, *, offset=0):
        return x * factor + offset

    assert scaled(torch.tensor(3), 2, offset=1) == 7
    scaled.implementation("wrong", usable=lambda x: True)(lambda x, factor, *, offset=0: factor - offset)
    assert scaled(torch.tensor(3), 2, offset=1) == 1


def test_what_runs_on_a_cpu():
    x = torch.ones(2, 3)
    assert attention.chosen(x) == "sdpa"
    for operation in (rms_norm, rms_norm_modulate, layer_norm_modulate, gated_residual, swiglu, qk_norm_rope):
        assert operation.chosen(x) == "reference"


class OnGpu(torch.Tensor):
    """As much of a CUDA tensor as a choice looks at."""

    is_cuda = True


def on_gpu(dtype, width=8):
    return torch.ones(width, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """write(name, source) puts a module of that name where it can be imported; found afresh, forgotten afterwards."""
    found = (optional.flash_attn, optional.apex_layer_norm)
    names = ("flash_attn", "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for function in found:
        function.cache_clear()

    def write(name, source=""):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()

    yield write
    for function in found:
        function.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def test_apex_of_pypi_is_not_taken_for_nvidias(packages):
    packages("apex.__init__", "class Toolkit: ...")
    assert optional.apex_layer_norm() is None
    assert rms_norm.chosen(on_gpu(torch.bfloat16)) == "reference"
    optional.apex_layer_norm.cache_clear()
    packages("fused_layer_norm_cuda")  # the extension alone does not make it NVIDIA's either
    assert optional.apex_layer_norm() is None


def test_apex_without_its_extension_is_not_used(packages):
    packages("apex.__init__")
    packages("apex.normalization.__init__")
    packages("apex.normalization.fused_layer_norm", "def fused_rms_norm_affine(*a): ...")
    assert optional.apex_layer_norm() is None


def test_apex_with_fused_norms_is_used(packages):
    packages("apex.__init__")
    packages("apex.normalization.__init__")
    packages(
        "apex.normalization.fused_layer_norm",
        "import torch\n"
        "def fused_rms_norm_affine(x, weight, normalized_shape, eps):\n"
        "    return torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)\n",
    )
    packages("fused_layer_norm_cuda")
    assert optional.apex_layer_norm().__name__ == "apex.normalization.fused_layer_norm"
    assert rms_norm.chosen(on_gpu(torch.bfloat16)) == "apex"
    assert rms_norm.chosen(torch.ones(2)) == "reference"
    fused = importlib.import_module("lumina.kernels.rms_norm_modulate")._apex_rms_norm
    x, weight = numbers(TOKENS, WIDTH, seed=0), numbers(WIDTH, seed=1)
    assert_close_to_exact(lambda *a: fused(*a, 1e-5), plain_rms_norm, [x, weight], torch.float32)


@pytest.mark.parametrize("source", ["", "raise ImportError('undefined symbol')"], ids=["version 1", "other build"])
def test_a_flash_attn_that_cannot_be_used_is_passed_over(packages, monkeypatch, source):
    packages("flash_attn", source)
    assert optional.flash_attn() is None
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: False)
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: True)
    assert attention.chosen(on_gpu(torch.bfloat16)) == "flash"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "cudnn", "name"),
    [
        (torch.bfloat16, 96, True, "cudnn"),
        (torch.bfloat16, 96, False, "flash"),
        (torch.float16, 48, False, "flash"),
        (torch.float32, 96, True, "sdpa"),
        (torch.bfloat16, 12, True, "sdpa"),
    ],
)
def test_attention_runs_on_what_the_ring_runs_on(monkeypatch, dtype, head_dim, cudnn, name):
    """... on CUDA, where samples of any lengths take one call."""
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: cudnn)
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: True)
    x = on_gpu(dtype, head_dim)
    assert attention.chosen(x) == name
    if name != "sdpa":
        assert lse_backend(x).name == name


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
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


def pack_arguments(**changes):
    """Of gated_residual_norm, by name."""
    named = {
        "x": torch.zeros(4, 6),
        "gate": torch.zeros(2, 6),
        "y": torch.zeros(4, 6),
        "weight": torch.zeros(6),
        "scale": torch.zeros(2, 6),
        "shift": torch.zeros(2, 6),
        "sample_id": torch.tensor([0, 0, 1, 1]),
    }
    return [*(named | changes).values(), 1e-5]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("gate", (1, 6), (2, 6)),
        ("gate", (2, 1), (2, 6)),
        ("y", (4, 8), (4, 6)),
        ("y", (2, 6), (4, 6)),
        ("weight", (1,), (6,)),
        ("shift", (2, 1), (2, 6)),
        ("sample_id", (2,), (4,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, wanted):
    """... by name, whatever runs: a kernel would read what is not there."""
    value = torch.zeros(shape, dtype=torch.long if name == "sample_id" else torch.float32)
    with pytest.raises(ValueError, match="has the shape") as caught:
        gated_residual_norm(*pack_arguments(**{name: value}))
    if name == "gate" and shape[0] == 1:
        assert "scale has the shape (2, 6), not (1, 6)" in str(caught.value)
    else:
        assert str(caught.value) == f"{name} has the shape {shape}, not {wanted}"


def test_other_operations_refuse_them_too():
    x, row, ids = torch.zeros(4, 6), torch.zeros(2, 6), torch.tensor([0, 0, 1, 1])
    narrow = torch.zeros(2, 5)
    for operation, arguments in (
        (rms_norm_modulate, (x, torch.zeros(6), narrow, narrow, ids, 1e-5)),
        (layer_norm_modulate, (x, row, narrow, ids, 1e-5)),
        (gated_residual, (x, narrow, x, ids)),
        (merge_attention, (torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2, 4), torch.zeros(4, 2))),
        (merge_attention, (torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2, 3), torch.zeros(2, 4))),
    ):
        with pytest.raises(ValueError, match="has the shape"):
            operation(*arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": (3, 8)}, r"k has the shape \(3, 8\), not \(4, 8\)"),
        ({"cos": (1, 2)}, r"cos has the shape \(1, 2\), not \(4, 2\)"),
        ({"k": (4, 6)}, "q is 8 and k 6 wide; heads of 4 elements must divide both"),
        ({"k_weight": None, "k_bias": None}, "norms q and k or neither; .* q_weight, q_bias is given alone"),
        ({"q_bias": None}, "norms q and k or neither"),
        ({"k_bias": (1,)}, r"k_bias has the shape \(1,\), not \(8,\)"),
    ],
)
def test_what_qk_norm_rope_refuses(change, sentence):
    shapes = {"q": (4, 8), "k": (4, 8)} | dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), (8,))
    shapes |= {"cos": (4, 2), "sin": (4, 2)} | change
    with pytest.raises(ValueError, match=sentence):
        qk_norm_rope(*(None if shape is None else torch.zeros(shape) for shape in shapes.values()))


def test_ids_are_looked_at_for_debugging():
    code = (
        "import sys, torch\nfrom lumina.kernels import gated_residual\n"
        "x, gate = torch.zeros(4, 6), torch.zeros(2, 6)\n"
        "for ids in ([1, 0, 1, 0], [0, 0, 1, 2]):\n"
        "    try:\n        gated_residual(x, gate, x, torch.tensor(ids))\n"
        "    except ValueError as error:\n        print(error)"
    )
    environment = os.environ | {"LUMINA_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "sample_id is not sorted: samples of a pack lie one after another",
        "sample_id goes from 0 to 2 for 2 samples",
    ]


def test_the_ring_runs_the_reference_where_that_is_forced(monkeypatch):
    q = torch.zeros(2, 1, 8)
    assert lse_backend(q).name == "cpu_flash"
    monkeypatch.setattr(attention_lse_backends, "REFERENCE_FORCED", True)
    assert lse_backend(q).name == "reference"
    assert lse_backend(q, "cpu_flash").name == "cpu_flash"


def test_cards_before_ampere_keep_to_sdpa(monkeypatch):
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: False)
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: True)
    assert attention.chosen(on_gpu(torch.float16)) == "sdpa"
