"""The residual connection of a modulated block."""

from torch import Tensor

from .dispatch import Operation


@Operation
def gated_residual(x_td: Tensor, gate_nd: Tensor, y_td: Tensor, sample_id_t: Tensor) -> Tensor:
    """``x + gate · y``, gate of the sample each token belongs to.

    Shapes: x, y (T, D) tokens; gate (N, D) samples; sample_id (T,) in [0, N).
    """
    return x_td + gate_nd[sample_id_t] * y_td
