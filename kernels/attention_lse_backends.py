"""The kernels that attention with lse can run on, and which is taken.

Shape suffixes: q query row, k key row, h head, e element of a head; b meeting, m query and n key of a batched call.
"""

import functools
import math
from abc import abstractmethod
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from . import optional
from .attention_lse import LseBackend, Part, sum_dtype
from .dispatch import REFERENCE_FORCED, gpu_is_assumed, on_gpu

_HALF = (torch.bfloat16, torch.float16)
# cuDNN builds a graph for each new pair of lengths, which takes 0.04 to 0.4 s: only long blocks make up for it. (Where
# it begins to pay has not been measured.)
CUDNN_MIN_ROWS = 1024


class _Batched(LseBackend):
    """Kernels over (B, H, rows, E), with lse (B, H, rows)."""

    equal_lengths = True

    @abstractmethod
    def _forward_batch(self, q_bhme: Tensor, k_bhne: Tensor, v_bhne: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward_batch(
        self, grad_out: Tensor, q_bhme: Tensor, k_bhne: Tensor, v_bhne: Tensor, out: Tensor, lse_bhm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def _forward(self, q, k, v, part):
        size = len(part.q_lengths)
        out, lse = self._forward_batch(*(_to_batch(x, size) for x in (q, k, v)))
        return _to_rows(out), _to_rows(lse)

    def _backward(self, grad_out, q, k, v, out, lse, part):
        size = len(part.q_lengths)
        gradients = self._backward_batch(*(_to_batch(x, size) for x in (grad_out, q, k, v, out, lse)))
        return tuple(_to_rows(x) for x in gradients)


def _to_batch(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, -1)).transpose(1, 2)


def _to_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


@functools.lru_cache(maxsize=1024)
def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(N+1,) int32. Who works on fake tensors clears the cache before and after: real ones do not go with them."""
    return torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)


class _Packed(LseBackend):
    """Kernels over (rows, H, E) and where each meeting starts, with lse (H, rows)."""

    equal_lengths = False

    @staticmethod
    def _lengths(part: Part, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        cu_q, cu_k = offsets(part.q_lengths, device), offsets(part.k_lengths, device)
        return cu_q, cu_k, max(part.q_lengths), max(part.k_lengths)

    def usable(self, q_qhe):
        head_dim = q_qhe.shape[-1]
        fits = q_qhe.dtype in _HALF and head_dim % 8 == 0 and head_dim <= 256
        return on_gpu(q_qhe) and fits and (gpu_is_assumed() or _since_ampere(q_qhe.device))


@functools.cache
def _since_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


class _Reference(_Batched):
    """The formulas, in fp32 or float64, on any device; memory grows with rows of q times rows of k."""

    name = "reference"

    def usable(self, q_qhe):
        return True

    def _forward_batch(self, q_bhme, k_bhne, v_bhne):
        q, k, v = (x.to(sum_dtype(x.dtype)) for x in (q_bhme, k_bhne, v_bhne))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ v, lse

    def _backward_batch(self, grad_out, q_bhme, k_bhne, v_bhne, out, lse_bhm):
        grad_out, q, k, v, out = (x.to(sum_dtype(x.dtype)) for x in (grad_out, q_bhme, k_bhne, v_bhne, out))
        scale = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * scale - lse_bhm[..., None]).exp()
        d_scores = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
        return d_scores @ k, d_scores.mT @ q, p.mT @ grad_out


class _CpuFlash(_Batched):
    """torch's tiled kernel for the CPU."""

    name = "cpu_flash"

    def usable(self, q_qhe):
        return (
            q_qhe.device.type == "cpu" and not on_gpu(q_qhe) and q_qhe.dtype in (*_HALF, torch.float32, torch.float64)
        )

    def _forward_batch(self, q_bhme, k_bhne, v_bhne):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_bhme, k_bhne, v_bhne)

    def _backward_batch(self, grad_out, q_bhme, k_bhne, v_bhne, out, lse_bhm):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q_bhme, k_bhne, v_bhne, out, lse_bhm, 0.0, False
        )


class _Efficient(_Batched):
    """torch's memory-efficient kernel (xFormers): the one on CUDA that takes fp32."""

    name = "efficient"
    lse_multiple = 32

    def usable(self, q_qhe):
        multiple = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}.get(q_qhe.dtype)
        return on_gpu(q_qhe) and multiple is not None and q_qhe.shape[-1] % multiple == 0

    def _forward_batch(self, q_bhme, k_bhne, v_bhne):
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q_bhme, k_bhne, v_bhne, None, True)
        return out, lse[..., : q_bhme.shape[2]]

    def _backward_batch(self, grad_out, q_bhme, k_bhne, v_bhne, out, lse_bhm):
        # As the forward kernel leaves it: rows up to a multiple of 32, +∞ in those that are not there.
        missing = -lse_bhm.shape[2] % self.lse_multiple
        lse = torch.nn.functional.pad(lse_bhm, (0, missing), value=math.inf).contiguous()
        no_dropout = torch.zeros((), dtype=torch.int64, device=lse.device)
        return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            q_bhme,
            k_bhne,
            v_bhne,
            None,
            out,
            lse,
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
        )[:3]


class _Flash(_Packed):
    """torch's own FlashAttention-2."""

    name = "flash"

    def _forward(self, q, k, v, part):
        lengths = self._lengths(part, q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False)
        return out, lse.mT

    def _backward(self, grad_out, q, k, v, out, lse, part):
        lengths = self._lengths(part, q.device)
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse.mT.contiguous(), *lengths, 0.0, False, no_dropout, no_dropout[0]
        )


class _Cudnn(_Flash):
    """cuDNN's kernel for a single long meeting; the rest is left to torch's FlashAttention-2."""

    name = "cudnn"

    def usable(self, q_qhe):
        if gpu_is_assumed():  # cuDNN itself says what it takes
            return False
        settings = (torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled())
        return super().usable(q_qhe) and _cudnn_takes(q_qhe.shape[-1], q_qhe.dtype, q_qhe.device, settings)

    @staticmethod
    def _takes(part: Part) -> bool:
        return len(part.q_lengths) == 1 and min(part.q_lengths[0], part.k_lengths[0]) >= CUDNN_MIN_ROWS

    def _forward(self, q, k, v, part):
        if not self._takes(part):
            return super()._forward(q, k, v, part)
        q, k, v = (_to_batch(x, 1) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return _to_rows(out), _to_rows(lse.reshape(out.shape[:3]))

    def _backward(self, grad_out, q, k, v, out, lse, part):
        if not self._takes(part):
            return super()._backward(grad_out, q, k, v, out, lse, part)
        # It wants the gradient laid out as the output.
        rows = (grad_out.contiguous(), q, k, v, out.contiguous(), lse)
        grad_out, q, k, v, out, lse = (_to_batch(x, 1) for x in rows)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse[..., None].contiguous(),  # as its forward pass gives it since torch 2.9
            no_dropout,
            no_dropout,
            None,  # bias
            None,  # where packed samples start
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            False,
        )
        return tuple(_to_rows(x) for x in gradients)


@functools.cache
def _cudnn_takes(head_dim: int, dtype: torch.dtype, device: torch.device, settings: tuple[bool, bool]) -> bool:
    # `settings` may change the answer.
    x = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device, requires_grad=True)
    params = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


class _FlashAttn(_Packed):
    """The flash-attn package, 2.7 or later (arXiv 2307.08691)."""

    name = "flash_attn"

    def usable(self, q_qhe):
        return super().usable(q_qhe) and not gpu_is_assumed() and _flash_attn_2() is not None

    def _forward(self, q, k, v, part):
        out, lse, *_ = _flash_attn_2()._wrapped_flash_attn_varlen_forward(
            q, k, v, *self._lengths(part, q.device), 0.0, q.shape[-1] ** -0.5, False
        )
        return out, lse.mT

    def _backward(self, grad_out, q, k, v, out, lse, part):
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _flash_attn_2()._wrapped_flash_attn_varlen_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse.mT.contiguous(),
            dq,
            dk,
            dv,
            *self._lengths(part, q.device),
            0.0,
            q.shape[-1] ** -0.5,
            False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _flash_attn_2() -> ModuleType | None:
    package = optional.flash_attn()
    interface = getattr(package, "flash_attn_interface", None)
    return interface if hasattr(interface, "_wrapped_flash_attn_varlen_backward") else None


class _FlashAttn3(_Packed):
    """FlashAttention-3 (arXiv 2407.08608), for Hopper."""

    name = "flash_attn_3"

    def usable(self, q_qhe):
        return (
            super().usable(q_qhe)
            and not gpu_is_assumed()
            and optional.flash_attn_3() is not None
            and torch.cuda.get_device_capability(q_qhe.device)[0] == 9
        )

    def _forward(self, q, k, v, part):
        cu_q, cu_k, max_q, max_k = self._lengths(part, q.device)
        out, lse, *_ = optional.flash_attn_3()._flash_attn_forward(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=q.shape[-1] ** -0.5,
        )
        return out, lse.mT

    def _backward(self, grad_out, q, k, v, out, lse, part):
        cu_q, cu_k, max_q, max_k = self._lengths(part, q.device)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        optional.flash_attn_3()._flash_attn_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse.mT.contiguous(),
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=q.shape[-1] ** -0.5,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


BACKENDS: tuple[LseBackend, ...] = (
    _FlashAttn3(),
    _Cudnn(),
    _FlashAttn(),
    _Flash(),
    _Efficient(),
    _CpuFlash(),
    _Reference(),
)
"""Those preferred first."""
PACKED = tuple(backend for backend in BACKENDS if isinstance(backend, _Packed))
"""Those that take samples of any lengths in one call, all on CUDA."""


def lse_backend(q_qhe: Tensor, name: str | None = None) -> LseBackend:
    """The backend of this name, or the fastest that runs on such queries; under LUMINA_KERNELS=reference, that.

    Raises:
        ValueError: for a name that is unknown, or whose backend cannot run on them.
    """
    usable = [backend for backend in BACKENDS if backend.usable(q_qhe)]
    if name is None:
        return usable[-1] if REFERENCE_FORCED else usable[0]
    for backend in usable:
        if backend.name == name:
            return backend
    known = "" if name in {backend.name for backend in BACKENDS} else " (no such backend)"
    raise ValueError(
        f"attention backend {name!r}{known} cannot run on {q_qhe.dtype} heads of {q_qhe.shape[-1]} elements on "
        f"{q_qhe.device.type}; use one of {', '.join(backend.name for backend in usable)}"
    )
