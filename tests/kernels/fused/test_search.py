"""Where a sample's rows begin, found by a search of many steps."""

import pytest
import torch

from lumina.kernels.triton_support import first_row_from, jit, tl
from tests.kernels.cases import sample_id


@jit
def search(ids_ptr, found_ptr, low, high, SEARCH: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    tl.store(found_ptr + sample, first_row_from(ids_ptr, zero + low, zero + high, sample, SEARCH))


@pytest.mark.parametrize("width", [2, 4, 16, 128])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_boundary(width, dtype, device):
    lengths = (0, 1, 0, 0, 17, 3, 29, 1, 0, 64, 2, 0)
    ids = sample_id(lengths, device).to(dtype)
    for low, high in ((0, len(ids)), (5, 90), (7, 7)):
        found = torch.full((len(lengths) + 1,), -1, device=device)
        search[(len(found),)](ids, found, low, high, SEARCH=width)
        inside = ids[low:high]
        expected = [low + int((inside < sample).sum()) for sample in range(len(found))]
        assert found.tolist() == expected
