"""Activation recomputation: what a block keeps for its backward pass, and where.

none: everything. full: the block's input; its forward pass is run again. selective: the input and what attention gave
(its output and log-sum-exp), so that attention, whose cost grows with the square of the length, is not run again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lumina.model.attention import AttentionInputs
from lumina.model.flag_dit import Block
from lumina.parallel.ring import SavedAttention, SequenceParallelCore


def run_block(
    block: Block,
    x_td: Tensor,
    c_nw: Tensor,
    sample_id_t: Tensor,
    inputs: AttentionInputs,
    recompute: str,
    offload: bool,
    wait_on_host: Callable[..., AbstractContextManager] = save_on_cpu,
) -> Tensor:
    """`block(…)`, keeping what `recompute` says, on the CPU if `offload`: `wait_on_host` is entered for that."""
    if recompute == "none":
        return block(x_td, c_nw, sample_id_t, inputs)
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        core = block.attention.core
        assert isinstance(core, SequenceParallelCore)
        saved = SavedAttention()
        settings["context_fn"] = lambda: (saved.record(core), saved.replay(core))
    if not offload:
        return checkpoint(block, x_td, c_nw, sample_id_t, inputs, **settings)
    with wait_on_host(pin_memory=x_td.is_cuda):
        return checkpoint(block, x_td, c_nw, sample_id_t, inputs, **settings)
