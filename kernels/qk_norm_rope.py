"""KQ-norm over the full width of queries and keys, then rotary embedding.

Moments are (4, T): mean and variance of the queries of each token, then of the keys. Where ranks share the width
(tensor parallelism), moments come from outside, forward, and so do the means that the gradient of a norm takes.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import qk_norm_rope_triton, triton_support
from .checks import expect
from .dispatch import Operation
from .reference import wide
from .registration import fused

LAYER_NORM_EPS = 1e-5


@runtime_checkable
class SharedWidth(Protocol):
    """What the ranks that share the width tell each other."""

    def moments(self, local_4t: Tensor) -> Tensor:
        """Mean and variance over all ranks' values, given those over this rank's."""

    def means(self, local_4t: Tensor) -> Tensor:
        """Means over all ranks' values, given those over this rank's."""


def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    shared: SharedWidth | None = None,
) -> None:
    tokens, head_dim = len(q), 2 * cos.shape[-1]
    if not head_dim or q.shape[-1] % head_dim or k.shape[-1] % head_dim:
        raise ValueError(f"q is {q.shape[-1]} and k {k.shape[-1]} wide; heads of {head_dim} elements must divide both")
    expect("k", k, (tokens, k.shape[-1]))
    for name, table in (("cos", cos), ("sin", sin)):
        expect(name, table, (tokens, head_dim // 2))
    affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    given = [name for name, x in affine.items() if x is not None]
    if given and len(given) < len(affine):
        raise ValueError(
            f"qk_norm_rope norms q and k or neither; of weights and biases {', '.join(given)} is given alone"
        )

    for name, x in affine.items():
        if x is not None:
            expect(name, x, (q.shape[-1] if name[0] == "q" else k.shape[-1],))


@Operation.checked(_check)
def qk_norm_rope(
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
    shared: SharedWidth | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of q and of k over all heads together, then rotation of the pairs (2i, 2i+1) of each head.

    Shapes: q (T, heads·D), k (T, kv_heads·D); weights and biases as wide, or None for no norm; cos, sin
    (T, D/2) fp32. Returns q (T, heads, D) and k (T, kv_heads, D) in the dtype they came in; fp32 inside.
    With `shared`, q, k, weights and biases are this rank's slices, equal to the others' in width.
    """
    affine = (q_weight, q_bias, k_weight, k_bias)
    if shared is None or q_weight is None:
        return _norm_rope(q_tw, q_weight, q_bias, cos_th, sin_th), _norm_rope(k_tw, k_weight, k_bias, cos_th, sin_th)
    return _Shared.apply(shared, _REFERENCE, q_tw, k_tw, *affine, cos_th, sin_th)


def _moments_of(x_tw: Tensor) -> Tensor:
    """(2, T)."""
    x = wide(x_tw)
    mean = x.mean(-1)
    return torch.stack((mean, (x - mean[:, None]).square().mean(-1)))


def _normed(x_tw: Tensor, moments_2t: Tensor) -> Tensor:
    mean, variance = moments_2t[..., None]
    return (wide(x_tw) - mean) * (variance + LAYER_NORM_EPS).rsqrt()


def _norm_rope(
    x_tw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
    moments: Tensor | None = None,
) -> Tensor:
    x = wide(x_tw)
    if weight is not None and moments is None:
        x = F.layer_norm(x, x.shape[1:], wide(weight), wide(bias), LAYER_NORM_EPS)
    elif weight is not None:
        x = torch.addcmul(wide(bias), _normed(x_tw, moments), wide(weight))
    return _rotated(x, cos_th, sin_th).to(x_tw.dtype)


def _rotated(x_tw: Tensor, cos_th: Tensor, sin_th: Tensor) -> Tensor:
    """(T, heads, D)."""
    half = cos_th.shape[1]
    pairs = x_tw.contiguous().view(len(x_tw), x_tw.shape[1] // (2 * half), half, 2)
    # As complex numbers, which a CPU turns in one pass over them.
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos_th, sin_th)[:, None]).flatten(-2)


def _parameter_grads(grad_tw: Tensor, normed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (grad_tw * normed).sum(0).to(weight.dtype), grad_tw.sum(0).to(weight.dtype)


def _means_of(grad_tw: Tensor, normed: Tensor, weight: Tensor) -> Tensor:
    grad = grad_tw * wide(weight)
    return torch.stack((grad.mean(-1), (grad * normed).mean(-1)))


def _grad_of_normed(grad_tw: Tensor, normed: Tensor, weight: Tensor, moments: Tensor, means: Tensor) -> Tensor:
    mean, along = means[..., None]
    return (grad_tw * wide(weight) - mean - normed * along) * (moments[1, :, None] + LAYER_NORM_EPS).rsqrt()


# Each custom op: what Triton runs, then the reference in its place.


def _forward_triton(
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = (q_weight, q_bias, k_weight, k_bias)
    return qk_norm_rope_triton.forward(q_tw, k_tw, affine, cos_th, sin_th, LAYER_NORM_EPS, moments_4t)


def _forward_reference(
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, and the moments that were taken here: (0, T) where they came from outside or there is no norm."""
    found, of_q, of_k = wide(q_tw).new_empty(0, len(q_tw)), None, None
    if q_weight is not None:
        moments = moments_4t
        if moments is None:
            moments = found = _moments_reference(q_tw, k_tw)
        of_q, of_k = moments[:2], moments[2:]
    q = _norm_rope(q_tw, q_weight, q_bias, cos_th, sin_th, of_q)
    return q, _norm_rope(k_tw, k_weight, k_bias, cos_th, sin_th, of_k), found


def _moments_triton(q_tw: Tensor, k_tw: Tensor) -> Tensor:
    return qk_norm_rope_triton.forward(q_tw, k_tw, (None,) * 4, None, None, LAYER_NORM_EPS)[2]


def _moments_reference(q_tw: Tensor, k_tw: Tensor) -> Tensor:
    return torch.cat((_moments_of(q_tw), _moments_of(k_tw)))


def _backward_triton(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = (grad_q_thd, grad_k_thd)
    grad_q, grad_k, of_parameters, _ = qk_norm_rope_triton.backward(
        grads, q_tw, k_tw, (q_weight, k_weight), cos_th, sin_th, moments_4t, LAYER_NORM_EPS
    )
    return grad_q, grad_k, *of_parameters


def _backward_reference(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_weight, q_bias, k_weight and k_bias."""
    arguments = (grad_q_thd, grad_k_thd, q_tw, k_tw, q_weight, k_weight, cos_th, sin_th, moments_4t)
    means, *of_parameters = _means_reference(*arguments)
    return *_apply_reference(*arguments, means), *of_parameters


def _means_triton(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = (grad_q_thd, grad_k_thd)
    *_, of_parameters, means = qk_norm_rope_triton.backward(
        grads, q_tw, k_tw, (q_weight, k_weight), cos_th, sin_th, moments_4t, LAYER_NORM_EPS, inputs=False
    )
    return means, *of_parameters


def _means_reference(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The means (4, T) over the width that gradients of q and k take; gradients of weights and biases."""
    of_q = _rotated_back(grad_q_thd, cos_th, sin_th), _normed(q_tw, moments_4t[:2]), q_weight
    of_k = _rotated_back(grad_k_thd, cos_th, sin_th), _normed(k_tw, moments_4t[2:]), k_weight
    return torch.cat((_means_of(*of_q), _means_of(*of_k))), *_parameter_grads(*of_q), *_parameter_grads(*of_k)


def _apply_triton(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
    means_4t: Tensor,
) -> tuple[Tensor, Tensor]:
    grads, weights = (grad_q_thd, grad_k_thd), (q_weight, k_weight)
    return qk_norm_rope_triton.backward(
        grads, q_tw, k_tw, weights, cos_th, sin_th, moments_4t, LAYER_NORM_EPS, means_4t, parameters=False
    )[:2]


def _apply_reference(
    grad_q_thd: Tensor,
    grad_k_thd: Tensor,
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_th: Tensor,
    sin_th: Tensor,
    moments_4t: Tensor,
    means_4t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    of_q = _rotated_back(grad_q_thd, cos_th, sin_th), _normed(q_tw, moments_4t[:2]), q_weight
    of_k = _rotated_back(grad_k_thd, cos_th, sin_th), _normed(k_tw, moments_4t[2:]), k_weight
    return (
        _grad_of_normed(*of_q, moments_4t[:2], means_4t[:2]).to(q_tw.dtype),
        _grad_of_normed(*of_k, moments_4t[2:], means_4t[2:]).to(k_tw.dtype),
    )


def _rotated_back(grad_thd: Tensor, cos_th: Tensor, sin_th: Tensor) -> Tensor:
    return _rotated(wide(grad_thd).flatten(1), cos_th, -sin_th).flatten(1)


def _rotate_back_triton(
    grad_q_thd: Tensor, grad_k_thd: Tensor, cos_th: Tensor, sin_th: Tensor
) -> tuple[Tensor, Tensor]:
    grads = (grad_q_thd, grad_k_thd)
    return qk_norm_rope_triton.backward(
        grads, None, None, (None, None), cos_th, sin_th, None, LAYER_NORM_EPS, parameters=False
    )[:2]


def _rotate_back_reference(
    grad_q_thd: Tensor, grad_k_thd: Tensor, cos_th: Tensor, sin_th: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k where there is no norm."""
    return tuple(_rotated_back(x, cos_th, sin_th).to(x.dtype) for x in (grad_q_thd, grad_k_thd))


_forward = fused("qk_norm_rope", _forward_triton)(_forward_reference)
_moments = fused("qk_norm_rope_moments", _moments_triton)(_moments_reference)
_backward = fused("qk_norm_rope_backward", _backward_triton)(_backward_reference)
_means = fused("qk_norm_rope_means_backward", _means_triton)(_means_reference)
_apply = fused("qk_norm_rope_apply_backward", _apply_triton)(_apply_reference)
_rotate_back = fused("rope_backward", _rotate_back_triton)(_rotate_back_reference)

_OPS = (_moments, _forward, _means, _apply)
_REFERENCE = (_moments_reference, _forward_reference, _means_reference, _apply_reference)


def _save(ctx, inputs, output):
    q, k, q_weight, _, k_weight, _, cos, sin, _ = inputs
    if q_weight is None:
        ctx.save_for_backward(cos, sin)
    else:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, output[2])


def _differentiate(ctx, grad_q, grad_k, _):
    saved = ctx.saved_tensors  # once: recomputation gives them a single time
    if len(saved) == 2:
        return *_rotate_back(grad_q, grad_k, *saved), *[None] * 7
    return *_backward(grad_q, grad_k, *saved), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Shared(torch.autograd.Function):
    """Where ranks share the width: one exchange forward, one backward."""

    @staticmethod
    def forward(ctx: Any, shared: SharedWidth, ops: tuple, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        moments, forward, *ctx.backward_ops = ops
        q, k, q_weight, _, k_weight, _, cos, sin = arguments
        ctx.shared = shared
        full_4t = shared.moments(moments(q, k))
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, full_4t)
        return forward(*arguments, full_4t)[:2]

    @staticmethod
    def backward(ctx: Any, *grads_thd: Tensor) -> tuple[Any, ...]:
        means, apply = ctx.backward_ops
        saved = ctx.saved_tensors
        local_4t, *of_parameters = means(*grads_thd, *saved)
        grads = apply(*grads_thd, *saved, ctx.shared.means(local_4t))
        return None, None, *grads, *of_parameters, None, None


@qk_norm_rope.implementation("triton", usable=triton_support.usable)
def _fused(
    q_tw: Tensor,
    k_tw: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos_th: Tensor,
    sin_th: Tensor,
    shared: SharedWidth | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = (q_tw, k_tw, q_weight, q_bias, k_weight, k_bias, cos_th, sin_th)
    if shared is None or q_weight is None:
        return _forward(*arguments, None)[:2]
    return _Shared.apply(shared, _OPS, *arguments)
