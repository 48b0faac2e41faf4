"""Attention with log-sum-exp, block by block, against the formula in float64, forward and backward.

The rules: relative L2 error at most 1e-6 in fp32 and 6e-3 in bf16 (a rounding is 2e-3), lse to 1e-6 in fp32 and
2e-5 in bf16 (torch's CPU kernel takes a rougher exponential there; an lse cast to bf16 would be 2e-3) of the largest.
"""

import inspect
import math
import types

import pytest
import torch

from lumina.kernels import attention_lse_backends as backends
from lumina.kernels import merge_attention, optional
from lumina.kernels.attention_lse import Meeting
from lumina.kernels.attention_lse_backends import BACKENDS, lse_backend

ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
ALLOWED_LSE = {torch.float32: 1e-6, torch.bfloat16: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [48, 96, 128])
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (3, 1)])
ROWS = 40, 45
MEETINGS = {
    "all": (Meeting(0, 40, 0, 45),),
    "packed": (Meeting(0, 7, 0, 20), Meeting(7, 8, 20, 21), Meeting(8, 40, 21, 45)),
    "some rows": (Meeting(3, 9, 30, 44), Meeting(20, 31, 0, 5)),
    "equal lengths": (Meeting(0, 9, 2, 13), Meeting(9, 18, 13, 24), Meeting(25, 34, 30, 41), Meeting(18, 20, 0, 2)),
    "with empty ones": (Meeting(0, 0, 0, 3), Meeting(0, 5, 7, 7), Meeting(6, 30, 8, 40)),
    "only empty ones": (Meeting(4, 4, 0, 9), Meeting(5, 9, 9, 9)),
    "none": (),
}


def numbers(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(heads, kv_heads, head_dim, dtype, rows=ROWS):
    """q, k, v and the gradient of the output."""
    q_rows, k_rows = rows
    shapes = (q_rows, heads), (k_rows, kv_heads), (k_rows, kv_heads), (q_rows, heads)
    return [numbers(*shape, head_dim, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def exact(q, k, v, grad_out, meetings):
    """(out, lse, dq, dk, dv) from the formula in float64, by autograd."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    repeats = q.shape[1] // k.shape[1]
    for q0, q1, k0, k1 in meetings:
        if q0 < q1 and k0 < k1:
            keys, values = (x[k0:k1].repeat_interleave(repeats, 1) for x in (k, v))
            scores = torch.einsum("qhe,khe->qhk", q[q0:q1], keys) / math.sqrt(q.shape[-1])
            lse[q0:q1] = scores.detach().logsumexp(-1)
            out[q0:q1] = torch.einsum("qhk,khe->qhe", scores.softmax(-1), values)
    out = out + 0 * (q.sum() + k.sum() + v.sum())  # differentiable where nobody meets, too
    gradients = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return out.detach(), lse, *gradients


def results(backend, q, k, v, grad_out, meetings):
    out, lse = backend.forward(q, k, v, meetings)
    return out, lse, *backend.backward(grad_out, q, k, v, out, lse, meetings)


def assert_right(found, truth, dtype, meetings):
    names = ("out", "lse", "dq", "dk", "dv")
    errors = {}
    for name, value, expected in zip(names, found, truth, strict=True):
        assert value.shape == expected.shape
        met = torch.zeros(len(value), dtype=torch.bool, device=value.device)
        for q0, q1, k0, k1 in meetings:
            start, stop = (k0, k1) if name in ("dk", "dv") else (q0, q1)
            met[start:stop] = q0 < q1 and k0 < k1
        assert (value[~met] == (-math.inf if name == "lse" else 0)).all()
        difference = (value - expected)[met]
        if name == "lse":
            assert value.dtype == torch.float32
            errors[name] = difference.abs().max() / expected[met].abs().max() if met.any() else 0.0
            assert errors[name] <= ALLOWED_LSE[dtype], errors
        else:
            errors[name] = difference.norm() / expected[met].norm() if met.any() else 0.0
            assert errors[name] <= ALLOWED[dtype], errors


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
@pytest.mark.parametrize("meetings", MEETINGS.values(), ids=MEETINGS)
@HEADS
@HEAD_DIMS
@DTYPES
def test_blocks(name, meetings, heads, kv_heads, head_dim, dtype):
    tensors = inputs(heads, kv_heads, head_dim, dtype)
    found = results(lse_backend(tensors[0], name), *tensors, meetings)
    assert_right(found, exact(*tensors, meetings), dtype, meetings)


@pytest.mark.parametrize("rows", [(0, 5), (5, 0), (0, 0)])
def test_no_rows(rows):
    q, k, v, grad_out = inputs(4, 2, 48, torch.bfloat16, rows)
    out, lse, dq, dk, dv = results(lse_backend(q), q, k, v, grad_out, (Meeting(0, rows[0], 0, rows[1]),))
    assert (out.shape, lse.shape, dq.shape) == (q.shape, q.shape[:2], q.shape)
    assert (dk.shape, dv.shape) == (k.shape, v.shape)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert (torch.cat((dk, dv)) == 0).all()


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
def test_float64_stays(name):
    tensors = inputs(4, 2, 48, torch.float64)
    found = results(lse_backend(tensors[0], name), *tensors, MEETINGS["packed"])
    for value, expected in zip(found, exact(*tensors, MEETINGS["packed"]), strict=True):
        assert value.dtype == torch.float64
        assert (value - expected).norm() <= 1e-14 * expected.norm()


def test_meetings_of_equal_lengths_take_one_call(monkeypatch):
    calls = []
    kernel = backends._CpuFlash._forward_batch
    monkeypatch.setattr(
        backends._CpuFlash,
        "_forward_batch",
        lambda self, q, k, v: calls.append(tuple(q.shape)) or kernel(self, q, k, v),
    )
    q, k, v, _ = inputs(4, 2, 48, torch.float32)
    lse_backend(q).forward(q, k, v, MEETINGS["equal lengths"])
    assert calls == [(3, 2, 18, 48), (1, 2, 4, 48)]  # meetings, kv heads, rows × query heads of each, elements
    lse_backend(q).forward(q, k, v, MEETINGS["only empty ones"])
    assert len(calls) == 2, "the kernel kills the process on an empty tensor"


# Blocks of a larger softmax.


@DTYPES
@HEADS
def test_two_halves_are_the_whole(dtype, heads, kv_heads):
    q, k, v, grad_out = inputs(heads, kv_heads, 96, dtype)
    backend, cut = lse_backend(q), 13
    whole = (Meeting(0, 40, 0, 45),)
    halves = [((Meeting(0, 40, 0, 13),), k[:cut], v[:cut]), ((Meeting(0, 40, 0, 32),), k[cut:], v[cut:])]
    out, lse = (x.float() for x in backend.forward(q, halves[0][1], halves[0][2], halves[0][0]))
    merge_attention(out, lse, *backend.forward(q, halves[1][1], halves[1][2], halves[1][0]))
    parts = [backend.backward(grad_out, q, ks, vs, out.to(dtype), lse, meetings) for meetings, ks, vs in halves]
    found = (
        out,
        lse,
        parts[0][0].float() + parts[1][0],
        torch.cat([p[1] for p in parts]),
        torch.cat([p[2] for p in parts]),
    )
    assert_right(found, exact(q, k, v, grad_out, whole), dtype, whole)


def test_merge_is_exact_in_float64():
    """Weights far apart, equal, and of blocks that saw nothing."""
    lse = torch.tensor([[0.0, 3.0, -1e4, 800.0, -math.inf, 2.0, -math.inf]], dtype=torch.float64)
    block_lse = torch.tensor([[0.0, 1.0, 1e4, 799.0, 5.0, -math.inf, -math.inf]], dtype=torch.float64)
    out, block = numbers(1, 7, 8, seed=1).double(), numbers(1, 7, 8, seed=2).double()
    out[:, [4, 6]], block[:, [5, 6]] = 0, 0
    weight = torch.tensor([0.5, 1 / (1 + math.exp(2)), 1, 1 / (1 + math.exp(1)), 1, 0, 0], dtype=torch.float64)
    expected = out * (1 - weight)[:, None] + block * weight[:, None]
    expected_lse = [math.log(2), 3 + math.log1p(math.exp(-2)), 1e4, 800 + math.log1p(math.exp(-1)), 5, 2, -math.inf]
    address = out.data_ptr()
    merge_attention(out, lse, block, block_lse)
    torch.testing.assert_close(out, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(lse, torch.tensor([expected_lse], dtype=torch.float64), rtol=1e-15, atol=0)
    assert out.data_ptr() == address


def test_merge_hides_no_nan():
    out, lse = torch.zeros(1, 2, 4), torch.zeros(1, 2)
    merge_attention(out, lse, torch.ones(1, 2, 4), torch.tensor([[math.nan, 0.0]]))
    assert out.isnan().all(-1).tolist() == [[True, False]]
    assert lse.isnan().tolist() == [[True, False]]


# Who runs.


def test_choice_on_cpu():
    q = torch.zeros(3, 2, 48, dtype=torch.bfloat16)
    assert lse_backend(q).name == "cpu_flash"
    assert lse_backend(q[:0]).name == "cpu_flash"
    assert lse_backend(q, "reference").name == "reference"
    with pytest.raises(ValueError, match=r"'cudnn' cannot run on .* use one of cpu_flash, refer"):
        lse_backend(q, "cudnn")
    with pytest.raises(ValueError, match="no such backend"):
        lse_backend(q, "cuDNN")


def test_preference_on_cuda():
    assert [b.name for b in BACKENDS[:5]] == ["flash_attn_3", "cudnn", "flash_attn", "flash", "efficient"]


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("meetings", [MEETINGS["all"], MEETINGS["packed"], MEETINGS["some rows"]])
@HEADS
def test_torchs_cuda_kernels_take_these_arguments(monkeypatch, name, meetings, heads, kv_heads):
    """Their operators check arguments and give shapes without a GPU, on the meta device."""
    monkeypatch.setattr(backends, "CUDNN_MIN_ROWS", 10)
    backend = next(b for b in BACKENDS if b.name == name)
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    q, k, v, grad_out = (x.to("meta") for x in inputs(heads, kv_heads, 48, dtype))
    out, lse, dq, dk, dv = results(backend, q, k, v, grad_out, meetings)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:2], torch.float32)
    assert [x.shape for x in (dq, dk, dv)] == [x.shape for x in (q, k, v)]


class PackagedKernel:
    """Functions with the published signatures of flash-attn 2.8 and of FlashAttention-3, as formulas for the CPU."""

    def attend(self, q, k, v, cu_q, cu_k, max_q, max_k, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        assert scale == pytest.approx(q.shape[-1] ** -0.5)
        ends = (x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]))
        self.meetings = tuple(Meeting(*of) for of in zip(*ends, strict=True))
        out, lse = self.formula.forward(q, k, v, self.meetings)
        return out, lse.mT.contiguous()

    formula = next(b for b in BACKENDS if b.name == "reference")

    def differentiate(self, dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, scale):
        assert lse.is_contiguous()
        self.attend(q, k, v, cu_q, cu_k, max_q, max_k, scale)
        gradients = self.formula.backward(dout, q, k, v, out, lse.mT, self.meetings)
        for place, value in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(value)

    def fa2_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal) == (0.0, False)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *self.attend(q, k, v, *lengths, softmax_scale), torch.empty(0), torch.empty(2)

    def fa2_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        self.differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, softmax_scale)
        return torch.empty(0)

    def fa3_forward(
        self, q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *self.attend(q, k, v, *lengths, softmax_scale), torch.empty(0), torch.empty(0)

    def fa3_backward(
        self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        self.differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, softmax_scale)
        return torch.empty(0)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3"])
@pytest.mark.parametrize("meetings", MEETINGS.values(), ids=MEETINGS)
@HEADS
def test_flash_attn_packages_are_called_as_published(monkeypatch, name, meetings, heads, kv_heads):
    kernel = PackagedKernel()
    monkeypatch.setattr(
        backends,
        "_flash_attn_2",
        lambda: types.SimpleNamespace(
            _wrapped_flash_attn_varlen_forward=kernel.fa2_forward,
            _wrapped_flash_attn_varlen_backward=kernel.fa2_backward,
        ),
    )
    monkeypatch.setattr(
        optional,
        "flash_attn_3",
        lambda: types.SimpleNamespace(_flash_attn_forward=kernel.fa3_forward, _flash_attn_backward=kernel.fa3_backward),
    )
    backend = next(b for b in BACKENDS if b.name == name)
    tensors = inputs(heads, kv_heads, 48, torch.float32)
    assert_right(results(backend, *tensors, meetings), exact(*tensors, meetings), torch.float32, meetings)


@pytest.mark.parametrize("version", ["none", "old", "new"])
def test_flash_attn_before_2_7_is_not_taken(monkeypatch, version):
    interface = types.ModuleType("flash_attn_interface")
    if version == "new":
        interface._wrapped_flash_attn_varlen_backward = None
    package = types.ModuleType("flash_attn") if version != "none" else None
    if package:
        package.flash_attn_interface = interface
    monkeypatch.setattr(optional, "flash_attn", lambda: package)
    assert (backends._flash_attn_2() is interface) == (version == "new")


# With a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.name != "cpu_flash"])
@HEAD_DIMS
@DTYPES
def test_blocks_on_cuda(name, head_dim, dtype):
    try:
        backend = lse_backend(torch.zeros(1, 2, head_dim, dtype=dtype, device="cuda"), name)
    except ValueError:
        pytest.skip(f"{name} cannot run here")
    cases = [(ROWS, meetings) for meetings in MEETINGS.values()]
    cases.append(((4096, 4097), (Meeting(0, 4096, 0, 4097),)))  # long enough for cuDNN
    for heads, kv_heads in ((2, 2), (4, 2)):
        for rows, meetings in cases:
            tensors = [x.cuda() for x in inputs(heads, kv_heads, head_dim, dtype, rows)]
            found = results(backend, *tensors, meetings)
            assert_right(found, exact(*tensors, meetings), dtype, meetings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_choice_on_cuda():
    q = torch.zeros(3, 2, 128, device="cuda")
    assert lse_backend(q).name == "efficient"
    assert lse_backend(q.bfloat16()).name in {"flash_attn_3", "cudnn", "flash_attn", "flash"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3"])
def test_installed_packages_have_the_published_signatures(name):
    package = {"flash_attn": backends._flash_attn_2, "flash_attn_3": optional.flash_attn_3}[name]()
    if package is None:
        pytest.skip(f"{name} is not installed")
    function = package._flash_attn_varlen_backward if name == "flash_attn" else package._flash_attn_backward
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    assert {"cu_seqlens_q", "max_seqlen_k", "softmax_scale", "deterministic", "dq"} <= set(parameters)
