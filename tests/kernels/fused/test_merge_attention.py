"""Merging blocks of attention in place."""

import math

import pytest
import torch

from lumina.kernels import merge_attention
from tests.kernels.plain import numbers

merge = merge_attention.named("triton")


def merged_exactly(out, lse, block_out, block_lse):
    """In float64, by the definition: each weight is the share of its exponential."""
    out, lse, block_out, block_lse = (x.double().clone() for x in (out, lse, block_out, block_lse))
    total = torch.logaddexp(lse, block_lse)
    mine, its = ((x - total).exp().nan_to_num(0.0)[..., None] for x in (lse, block_lse))
    nothing = (total == -math.inf)[..., None]
    return torch.where(nothing, out, out * mine + block_out * its), total


@pytest.mark.parametrize("head_dim", [48, 72, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(head_dim, dtype, device):
    out, block = numbers(37, 3, head_dim, seed=0).to(device), numbers(37, 3, head_dim, seed=1).to(device, dtype)
    lse, block_lse = (numbers(37, 3, seed=2 + i, scale=4).to(device) for i in range(2))
    expected = merged_exactly(out, lse, block, block_lse)
    assert merge(out, lse, block, block_lse) is None
    for found, truth in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


def test_far_and_missing_blocks(device):
    lse = torch.tensor([[0.0, 3.0, -1e4, 800.0, -math.inf, 2.0, -math.inf, 5.0]], device=device)
    block_lse = torch.tensor([[0.0, 1.0, 1e4, 799.0, 5.0, -math.inf, -math.inf, 5.0]], device=device)
    out, block = numbers(1, 8, 48, seed=1).to(device), numbers(1, 8, 48, seed=2).to(device)
    out[:, [4, 6]], block[:, [5, 6]] = 0, 0
    expected, expected_lse = merged_exactly(out, lse, block, block_lse)
    merge(out, lse, block, block_lse)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=4e-7, atol=0)


def test_what_has_no_weight_leaves_nothing(device):
    """However large it is: neither what was there nor the block rounds the other."""
    out, lse = torch.full((1, 2, 48), 1e8, device=device), torch.tensor([[-1e4, 1e4]], device=device)
    block = torch.full((1, 2, 48), 1.2345678, device=device)
    out[:, 1], block[:, 1] = block[:, 0], out[:, 0]
    merge(out, lse, block, torch.zeros(1, 2, device=device))
    assert torch.equal(out, torch.full_like(out, 1.2345678))


def test_no_nan_is_hidden(device):
    out, lse = torch.zeros(1, 4, 48, device=device), torch.tensor([[0.0, 0.0, math.nan, math.nan]], device=device)
    block_lse = torch.tensor([[math.nan, 0.0, 0.0, -math.inf]], device=device)
    merge(out, lse, torch.ones_like(out), block_lse)
    assert out.isnan().all(-1).tolist() == [[True, False, True, False]]
    assert lse.isnan().tolist() == [[True, False, True, True]]


def test_eight_blocks_keep_fp32(device):
    """As many merges as a ring of 8 makes: the error stays a few roundings."""
    blocks = [(numbers(9, 2, 48, seed=i).to(device), numbers(9, 2, seed=50 + i).to(device)) for i in range(8)]
    out, lse = (x.clone() for x in blocks[0])
    exact = [x.double() for x in blocks[0]]
    for block in blocks[1:]:
        merge(out, lse, *block)
        exact = merged_exactly(*exact, *block)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-6, atol=1e-6)


def test_strided_views(device):
    """Rows of a longer output, blocks with heads outermost: what is beside the rows stays."""
    out, lse = numbers(20, 3, 48, seed=0).to(device), numbers(20, 3, seed=1).to(device)
    block = numbers(3, 8, 48, seed=2).to(device).transpose(0, 1)
    block_lse = numbers(3, 8, seed=3).to(device).T
    before = out.clone(), lse.clone()
    expected = merged_exactly(out[5:13], lse[5:13], block, block_lse)
    merge(out[5:13], lse[5:13], block, block_lse)
    for found, was, truth in zip((out, lse), before, expected, strict=True):
        torch.testing.assert_close(found[5:13].double(), truth, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[:5], was[:5])
        assert torch.equal(found[13:], was[13:])


def test_heads_outermost_in_place(device):
    out, lse = numbers(3, 8, 48, seed=0).to(device).transpose(0, 1), numbers(3, 8, seed=1).to(device).T
    block, block_lse = numbers(8, 3, 96, seed=2).to(device)[..., ::2], numbers(8, 3, seed=3).to(device)
    expected, _ = merged_exactly(out, lse, block, block_lse)
    merge(out, lse, block, block_lse)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_elements_that_lie_apart_are_refused(device):
    out = numbers(4, 2, 96, seed=0).to(device)[..., ::2]
    with pytest.raises(ValueError, match="lie together; the stride is 2"):
        merge(out, out[..., 0].clone(), out.clone(), out[..., 0].clone())


def test_nothing_to_merge(device):
    out, lse = torch.empty(0, 3, 48, device=device), torch.empty(0, 3, device=device)
    merge(out, lse, out.clone(), lse.clone())
