"""The gated activation of the feed-forward network."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Operation


@Operation
def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) · b`` of two tensors of one shape (Shazeer, arXiv 2002.05202)."""
    return F.silu(a) * b
