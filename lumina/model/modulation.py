"""What conditions every block: the timestep embedding, the shift, scale and gate made from it, and the norm."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lumina.kernels import rms_norm

FREQUENCIES = 256


def timestep_sinusoid(t: Float[Tensor, "n"], width: int = FREQUENCIES) -> Float[Tensor, "n width"]:
    """cos half, then sin half; t in [0, 1] is not scaled. fp32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid, then Linear → SiLU → Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n width"]:
        return self.mlp(timestep_sinusoid(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class embedding; the row after the last class is "none", the unconditional one."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Float[Tensor, "n width"]:
        return self.embedding_table(labels)


class Modulation(nn.Sequential):
    """SiLU → Linear(width → count · dim), split into its `count` vectors.

    A Sequential so that the Linear keeps its public name, `adaLN_modulation.1`.
    """

    def __init__(self, width: int, dim: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(width, count * dim))
        self.count = count

    def forward(self, c_nw: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n dim"], ...]:
        return super().forward(c_nw).chunk(self.count, dim=-1)


class RMSNorm(nn.Module):
    """RMSNorm with weight (Zhang & Sennrich, arXiv 1910.07467); blocks hand its weight to fused operations."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, self.weight, self.eps)
