"""How a Flag-DiT is cut between ranks: which weights tensor parallelism shares, which blocks are on a pipeline stage,
which tokens and heads are whose.

Tables and arithmetic alone, without process groups: the planner counts with them.
"""

import fnmatch
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lumina.model.flag_dit import FlagDiT

COLUMN, ROW, GATHERED_COLUMN, NORM, VECTOR = "column", "row", "gathered column", "norm", "vector"

TABLE = {
    "layers.*.attention.wq": COLUMN,
    "layers.*.attention.wk": COLUMN,
    "layers.*.attention.wv": COLUMN,
    "layers.*.attention.wk_y": COLUMN,
    "layers.*.attention.wv_y": COLUMN,
    "layers.*.attention.wo": ROW,
    "layers.*.attention.q_norm": NORM,  # over the full width, with a slice of its weight and bias on each rank
    "layers.*.attention.k_norm": NORM,
    "layers.*.attention.ky_norm": NORM,
    "layers.*.attention.gate": VECTOR,
    "layers.*.feed_forward.w1": COLUMN,
    "layers.*.feed_forward.w3": COLUMN,
    "layers.*.feed_forward.w2": ROW,
    # A tenth of the weights, used once a sample: what they make is small and every rank needs all of it.
    "layers.*.adaLN_modulation.1": GATHERED_COLUMN,
    "final_layer.adaLN_modulation.1": GATHERED_COLUMN,
}
# Replicated, and used on the tokens between regions: under sequence parallel each rank's gradient is of its own tokens.
ON_TOKENS = (
    "x_embedder.*",
    "eol_token",
    "nextframe_token",
    "layers.*.attention_norm.*",
    "layers.*.ffn_norm.*",
    "final_layer.linear.*",
)

ON_FIRST_STAGE = (
    "x_embedder",
    "t_embedder",
    "cap_embedder",
    "y_embedder",
    "eol_token",
    "pad_token",
    "nextframe_token",
)


def kind_of(name: str) -> str | None:
    """How a module or parameter of this name is cut; None for what is replicated."""
    return next((kind for pattern, kind in TABLE.items() if fnmatch.fnmatchcase(name, pattern)), None)


def bounds(total: int, parts: int) -> tuple[int, ...]:
    """Where each of `parts` stretches of `total` tokens starts, and the end; lengths differ by at most one."""
    return tuple(total * part // parts for part in range(parts + 1))


def kv_head_counts(kv_heads: int, size: int) -> tuple[int, ...]:
    """Key-value heads of each rank; they differ by at most one. The query heads follow theirs.

    Raises:
        ValueError: where a rank would have none.
    """
    if kv_heads < size:
        raise ValueError(
            f"parallel.ulysses={size} splits heads and there are {kv_heads} key-value heads to a rank: set "
            f"parallel.ulysses to {kv_heads} or less (parallel.ring has no such limit), or use {size} key-value heads"
        )
    return tuple(stop - start for start, stop in pairwise(bounds(kv_heads, size)))


def cut(costs: Sequence[float], stages: int) -> list[range]:
    """Blocks in order, cut into `stages` stretches of at least one, the dearest as cheap as can be."""
    count = len(costs)
    sums = [sum(costs[:i]) for i in range(count + 1)]
    # best[i]: the smallest possible dearest stretch of the first i blocks, and where its last stretch starts
    best = [(sums[i], 0) for i in range(count + 1)]
    starts = []
    for stage in range(2, stages + 1):
        best = [
            min((max(best[j][0], sums[i] - sums[j]), j) for j in range(stage - 1, i))
            if i >= stage
            else (float("inf"), 0)
            for i in range(count + 1)
        ]
        starts.append([j for _, j in best])
    stop, stretches = count, []
    for table in reversed(starts):
        stretches.append(range(table[stop], stop))
        stop = table[stop]
    return [range(0, stop), *reversed(stretches)]


def stage_costs(model: FlagDiT) -> list[float]:
    """Cost of each block in multiply-adds a token, that of the embedders and of the head on the first and the last."""

    def weights(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    costs = [float(weights(block.attention) + weights(block.feed_forward)) for block in model.layers]
    costs[0] += weights(model.x_embedder)
    costs[-1] += weights(model.final_layer.linear)
    return costs
