"""The norm over a width that ranks share, and the collectives, against one process in float64."""

import pytest
import torch

from tests.parallel.workers import run_ranks

RANKS, WIDTH, EPS = 2, 24, 1e-5


def rows() -> torch.Tensor:
    """Rows of which each is hard in its own way, (5, WIDTH)."""
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-3  # eps decides
    x[2] += 1e3  # a sum of squares would cancel
    x[3] = 0
    x[4, WIDTH // 2 :] += 50  # the ranks' halves differ
    return x


def affine() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)


def norm_of_ranks(rank: int, precision: str) -> list:
    """This rank's columns of the norm, and the gradients of x, weight and bias."""
    from lumina.config.schema import ParallelConfig
    from lumina.parallel.mesh import open_mesh
    from lumina.parallel.tensor import FullWidthLayerNorm

    mesh = open_mesh(ParallelConfig(tensor=RANKS))
    whole = torch.nn.LayerNorm(WIDTH, EPS)
    weight, bias = affine()
    whole.weight.data, whole.bias.data = weight, bias
    norm = FullWidthLayerNorm(whole, mesh.tensor)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = rows().to(dtype).chunk(RANKS, dim=1)[rank].contiguous().requires_grad_()
    out = norm(x)
    out.float().backward(weights_of_loss().chunk(RANKS, dim=1)[rank])
    assert out.dtype == x.grad.dtype == dtype
    return [t.detach().float().numpy() for t in (out, x.grad, norm.weight.grad, norm.bias.grad)]


def weights_of_loss() -> torch.Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_norm_is_over_the_full_width(precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    exact = rows().to(dtype).double().requires_grad_()
    weight, bias = (t.double().requires_grad_() for t in affine())
    out = torch.nn.functional.layer_norm(exact, (WIDTH,), weight, bias, EPS)
    out.backward(weights_of_loss().double())
    told = run_ranks(RANKS, norm_of_ranks, precision)
    expected = (out.detach(), exact.grad, weight.grad, bias.grad)
    # At a mean of 1e3 the input itself is rounded to 6e-5 of its deviation; the rest is exact to a few ulp.
    for index, (name, right) in enumerate(zip(("out", "x", "weight", "bias"), expected, strict=True)):
        found = torch.cat([torch.from_numpy(rank[index]) for rank in told], dim=-1).double()
        error = (found - right).abs() / right.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9)
        assert error.max() < (2e-4 if precision == "fp32" else 1e-2), (name, error.max())


def both_ways(rank: int, total: int) -> list[float]:
    """<y, A x> - <Aᵀ y, x> for each collective, summed over ranks: zero for adjoints."""
    from lumina.config.schema import ParallelConfig
    from lumina.parallel import collectives as c
    from lumina.parallel.cuts import bounds
    from lumina.parallel.mesh import open_mesh

    mesh = open_mesh(ParallelConfig(tensor=RANKS))
    axis, cuts = mesh.tensor, bounds(total, RANKS)
    mine = cuts[rank + 1] - cuts[rank]
    generator = torch.Generator().manual_seed(rank)
    found = []
    for function, length in (
        (lambda x: c.gather_tokens(x, axis, total), mine),
        (lambda x: c.scatter_sum_tokens(x, axis), total),
        (lambda x: c.gather_columns(x, axis, partial_gradients=True), 3),
    ):
        x = torch.randn(length, 2, dtype=torch.float64, generator=generator).requires_grad_()
        out = function(x)
        y = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        out.backward(y)
        found += mesh.sum([float((y * out).sum() - (x.grad * x).sum()), float((y * out).sum())])
    # What leaves these is the same on all ranks: y must be as well.
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    y = torch.ones(3, 2, dtype=torch.float64)
    c.sum_partial(x, axis).backward(y)
    found += [float((x.grad - y).abs().sum()), 1.0]
    x = torch.ones(3, 2, dtype=torch.float64).requires_grad_()
    c.spread(x, axis).backward(torch.full((3, 2), rank + 1.0, dtype=torch.float64))
    found += [float((x.grad - 3.0).abs().sum()), 1.0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("total", [7, 1])
def test_collectives_and_their_adjoints(total):
    for found in run_ranks(RANKS, both_ways, total):
        for apart, size in zip(found[::2], found[1::2], strict=True):
            assert abs(apart) < 1e-12 < abs(size)
