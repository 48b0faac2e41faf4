"""Tensor parallelism, laid over a Flag-DiT from outside (Megatron-LM, arXiv 1909.08053; sequence parallel, 2205.05198).

Each attention and each feed-forward is a region in which a rank works on its own heads, or columns, of all tokens: the
tokens are spread on the way in, and the partial products summed on the way out. Between regions every rank holds all
tokens or, under sequence parallel, its stretch of them. `cuts.TABLE` says how each module is cut; what it does not name
is replicated.

Shape suffixes: t token, d model dim, n sample, w width of queries or keys.
"""

import fnmatch
import warnings
from typing import Any

import torch
from torch import Tensor, nn

# It warns of apex, Transformer Engine and other things that it would rather have.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from lumina.kernels import qk_norm_rope
from lumina.model.attention import AttentionInputs, NormRope
from lumina.model.flag_dit import Block, FlagDiT
from lumina.model.modulation import Modulation
from lumina.parallel.collectives import (
    all_gather,
    all_reduced,
    gather_columns,
    gather_tokens,
    scatter_sum_tokens,
    spread,
    sum_partial,
)
from lumina.parallel.cuts import COLUMN, GATHERED_COLUMN, NORM, ON_TOKENS, ROW, VECTOR, kind_of
from lumina.parallel.fragments import Part
from lumina.parallel.mesh import Axis, Mesh


def parallelize_tensor(model: FlagDiT, mesh: Mesh) -> dict[str, Part]:
    """Cut `model`, which holds the whole weights, down to this rank's part, in place.

    Returns which part of each cut parameter this rank holds, by its public name. Cut parameters are marked
    ``tensor_model_parallel``, by which DeepSpeed counts them on every rank in the gradient norm.
    """
    axis = mesh.tensor
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        kind = kind_of(name)
        if kind is None:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _cut_module(module, kind, mesh))
        dim = 1 if kind == ROW else 0
        for leaf, parameter in module.named_parameters(recurse=False):
            parts[f"{name}.{leaf}"] = _part(parameter, dim, axis)
    for name, parameter in list(model.named_parameters()):
        if kind_of(name) == VECTOR:
            parts[name] = _part(parameter, 0, axis)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(_slice(parameter, parts[name])))
    for module in model.modules():
        if isinstance(module, Block):
            _enclose(module, mesh)
        if isinstance(module, Modulation):
            # Each rank makes a slice of the modulation out of the whole condition.
            module.register_forward_pre_hook(lambda _, args: (spread(args[0], axis),))
    for name, parameter in model.named_parameters():
        if name in parts:
            parameter.tensor_model_parallel = True
        elif mesh.sequence_parallel and any(fnmatch.fnmatchcase(name, pattern) for pattern in ON_TOKENS):
            sum_gradient(parameter, axis)
    return parts


def sum_gradient(parameter: nn.Parameter, axis: Axis) -> None:
    """Sum the gradient of a replicated parameter over ranks that each used it on tokens of their own."""
    parameter.register_hook(lambda gradient: all_reduced(gradient, axis))


def _part(parameter: Tensor, dim: int, axis: Axis) -> Part:
    size = parameter.shape[dim] // axis.size
    return Part(dim, axis.rank * size, (axis.rank + 1) * size)


def _slice(parameter: Tensor, part: Part) -> Tensor:
    return parameter.detach().narrow(part.dim, part.start, part.stop - part.start).clone()


def _cut_module(module: nn.Module, kind: str, mesh: Mesh) -> nn.Module:
    if kind == NORM:
        return FullWidthLayerNorm(module, mesh.tensor)
    make = {COLUMN: _Column, ROW: _Row, GATHERED_COLUMN: _GatheredColumn}[kind]
    return make(module, mesh)


def _enclose(block: Block, mesh: Mesh) -> None:
    """Make a block's attention and feed-forward regions in which ranks share heads and columns."""
    axis, sequence_parallel = mesh.tensor, mesh.sequence_parallel

    def enter(x_td: Tensor, total: int) -> Tensor:
        return gather_tokens(x_td, axis, total) if sequence_parallel else spread(x_td, axis)

    def enter_attention(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_td, inputs, captions_sd = args
        captions_sd = None if captions_sd is None else spread(captions_sd, axis)
        return enter(x_td, len(inputs.cos_te)), inputs, captions_sd

    def enter_feed_forward(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (enter(args[0], block.tokens_in_region),)

    def leave(_: nn.Module, args: tuple[Any, ...], out_td: Tensor) -> Tensor:
        return scatter_sum_tokens(out_td, axis) if sequence_parallel else sum_partial(out_td, axis)

    def note_length(_: nn.Module, args: tuple[Any, ...]) -> None:
        block.tokens_in_region = len(args[3].cos_te)  # the feed-forward does not see the attention inputs

    block.register_forward_pre_hook(note_length)
    block.attention.norm_rope = FullWidthNormRope()
    block.attention.register_forward_pre_hook(enter_attention)
    block.attention.register_forward_hook(leave)
    block.feed_forward.register_forward_pre_hook(enter_feed_forward)
    block.feed_forward.register_forward_hook(leave)


def _settings(linear: nn.Linear, mesh: Mesh) -> dict[str, Any]:
    config = ModelParallelConfig(
        tensor_model_parallel_size=mesh.tensor.size,
        use_cpu_initialization=True,  # also on a GPU: weights are cut from the whole ones and moved by the engine
        perform_initialization=False,
        params_dtype=linear.weight.dtype,
    )
    return {
        "input_size": linear.in_features,
        "output_size": linear.out_features,
        "bias": linear.bias is not None,
        "config": config,
        "init_method": _not_called,
        "skip_bias_add": False,
        "tp_group": mesh.tensor.group,
    }


def _not_called(weight: Tensor) -> None:
    raise AssertionError("weights are cut from the whole ones, never drawn here")


def _take(module: nn.Module, linear: nn.Linear, dim: int, axis: Axis) -> None:
    """Fill a Megatron layer with this rank's part of `linear`."""
    for name, whole in linear.named_parameters():
        getattr(module, name).data = _slice(whole, _part(whole, dim, axis))


class _Column(ColumnParallelLinear):
    """Rows of the weight, columns of the output. What enters was spread when its region was."""

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(gather_output=False, disable_grad_reduce=True, **_settings(linear, mesh))
        _take(self, linear, 0, mesh.tensor)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _GatheredColumn(_Column):
    """A column-parallel Linear whose whole output is on every rank."""

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(linear, mesh)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        # Under sequence parallel every rank modulates its own tokens, and has the gradient of those.
        return gather_columns(super().forward(x), self.mesh.tensor, partial_gradients=self.mesh.sequence_parallel)


class _Row(RowParallelLinear):
    """Columns of the weight; the output is this rank's summand, summed where its region is left."""

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(input_is_parallel=True, **_settings(linear, mesh))
        _take(self, linear, 1, mesh.tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(
            input=x,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
            grad_output_buffer=None,
        )


class FullWidthLayerNorm(nn.Module):
    """LayerNorm over a width that ranks share, each with its slice of values, weight and bias."""

    def __init__(self, norm: nn.LayerNorm, axis: Axis):
        super().__init__()
        self.axis, self.eps = axis, norm.eps
        part = _part(norm.weight, 0, axis)
        self.weight = nn.Parameter(_slice(norm.weight, part))
        self.bias = nn.Parameter(_slice(norm.bias, part))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (T, W/size), normed in fp32 over the W values of all ranks, in the dtype it came in."""
        return normalise_full_width((x,), (self,))[0].to(x.dtype)


class FullWidthNormRope(NormRope):
    """KQ-norm over all heads of all ranks, queries and keys in one exchange, then rotary embedding of this rank's."""

    def forward(
        self,
        q_td: Tensor,
        k_td: Tensor,
        q_norm: FullWidthLayerNorm | None,
        k_norm: FullWidthLayerNorm | None,
        inputs: AttentionInputs,
    ) -> tuple[Tensor, Tensor]:
        if q_norm is None:
            return qk_norm_rope(q_td, k_td, None, None, None, None, inputs.cos_te, inputs.sin_te)
        affine = (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
        return qk_norm_rope(q_td, k_td, *affine, inputs.cos_te, inputs.sin_te, FullWidth(q_norm.axis))


class FullWidth:
    """Moments and means over the width that ranks share, of equal slices (the kernel's `SharedWidth`)."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def moments(self, local_4t: Tensor) -> Tensor:
        return torch.cat([_moments_of_all(of_ranks) for of_ranks in all_gather(local_4t, self.axis).split(2, dim=1)])

    def means(self, local_4t: Tensor) -> Tensor:
        return all_reduced(local_4t, self.axis) / self.axis.size


def _moments_of_all(of_ranks_r2t: Tensor) -> Tensor:
    """Mean and variance (2, T) of the whole, given those of each rank's equal slice."""
    # The variance of the whole is the mean variance plus the variance of the means. A sum of squares would cancel
    # where the mean is large.
    means, variances = of_ranks_r2t.unbind(1)
    spread_of_means, mean = torch.var_mean(means, dim=0, correction=0)
    return torch.stack((mean, variances.mean(0) + spread_of_means))


def normalise_full_width(values: tuple[Tensor, ...], norms: tuple[FullWidthLayerNorm, ...]) -> list[Tensor]:
    """Each (T, W_i/size) through its norm, fp32; one exchange of T·2 numbers a tensor, forward and backward."""
    normed = _Normalise.apply(norms[0].axis, norms[0].eps, *values)
    return [x * norm.weight.float() + norm.bias.float() for x, norm in zip(normed, norms, strict=True)]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, eps: float, *values_tw: Tensor) -> tuple[Tensor, ...]:
        moments, normed, deviations = [], [], []
        for x in values_tw:
            variance, mean = torch.var_mean(x.float(), dim=1, correction=0)
            moments += [mean, variance]
        of_ranks = all_gather(torch.stack(moments), axis)
        for i, x in enumerate(values_tw):
            mean, variance = _moments_of_all(of_ranks[:, 2 * i : 2 * i + 2])
            inverse = (variance + eps).rsqrt()[:, None]
            normed.append((x.float() - mean[:, None]) * inverse)
            deviations.append(inverse)
        ctx.axis, ctx.dtypes = axis, [x.dtype for x in values_tw]
        ctx.save_for_backward(*normed, *deviations)
        return tuple(normed)

    @staticmethod
    def backward(ctx: Any, *grads_tw: Tensor) -> tuple[Any, ...]:
        count = len(grads_tw)
        saved = ctx.saved_tensors  # once: recomputation gives them a single time
        normed, inverses = saved[:count], saved[count:]
        moments = []
        for grad, x in zip(grads_tw, normed, strict=True):
            moments += [grad.mean(1), (grad * x).mean(1)]
        moments = all_reduced(torch.stack(moments), ctx.axis) / ctx.axis.size
        results = []
        for i, (grad, x, inverse, dtype) in enumerate(zip(grads_tw, normed, inverses, ctx.dtypes, strict=True)):
            mean, along = moments[2 * i, :, None], moments[2 * i + 1, :, None]
            results.append(((grad - mean - x * along) * inverse).to(dtype))
        return None, None, *results
