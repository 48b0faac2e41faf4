"""What one rank runs of a Flag-DiT: its blocks, on its tokens, from patches to velocity if there is no pipeline.

Shape suffixes: t token of this rank, n sample, w condition width, d model dim, p patch element.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from lumina.config.schema import ParallelConfig
from lumina.kernels import attention
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.model.attention import AttentionInputs
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import Captions
from lumina.parallel.cuts import ON_FIRST_STAGE, cut, stage_costs
from lumina.parallel.fragments import Part
from lumina.parallel.mesh import Mesh
from lumina.parallel.recompute import run_block
from lumina.parallel.ring import SequenceParallelCore
from lumina.parallel.sequence import Stretch


@runtime_checkable  # or the shape checks of the tests cannot look at it
class Conditions(Protocol):
    """What a stage is told of a pack, beside its tokens. The same on all ranks that work on the pack."""

    t: Tensor
    stretch: Stretch
    captions: Captions | None
    labels: Tensor | None


class Stage(nn.Module):
    """Blocks [first, last) of `model`, with the embedders before block 0 and the head after the last block."""

    def __init__(self, model: FlagDiT, blocks: range, mesh: Mesh, *, recompute: str, offload: bool):
        """`model` is taken over, and loses what other stages have."""
        super().__init__()
        self.config = model.config
        self.recompute, self.offload = recompute, offload
        self.wait_on_host = save_on_cpu
        self.has_first, self.has_last = blocks.start == 0, blocks.stop == len(model.layers)
        # Under their own numbers, so that parameters keep their public names.
        model.layers = nn.ModuleDict({str(i): model.layers[i] for i in blocks})
        if not self.has_first:
            for name in ON_FIRST_STAGE:
                if hasattr(model, name):
                    delattr(model, name)
        if not self.has_last:
            del model.final_layer
        self.model = model
        if mesh.ring.size * mesh.ulysses.size > 1 or recompute == "selective":
            for block in model.layers.values():
                block.attention.core = SequenceParallelCore(mesh.ring, mesh.ulysses)

    @property
    def attention_backend(self) -> str:
        """Name of what self-attention runs on."""
        weight = next(self.model.parameters())
        q_the = weight.new_empty(1, 1, self.config.head_dim)
        core = next(iter(self.model.layers.values())).attention.core
        ours = isinstance(core, SequenceParallelCore)
        return lse_backend(q_the, core.backend).name if ours else attention.chosen(q_the)

    def forward(self, x_tp: Tensor, conditions: Conditions) -> Tensor:
        """The velocity (T, P) of this rank's rows, of a model that is all on one stage."""
        c_nw, x_td = self.embed(x_tp, conditions)
        return self.head(c_nw, self.run_blocks(c_nw, x_td, conditions), conditions).to(x_tp.dtype)

    def embed(self, x_tp: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """c (N, W), from which all modulation is made, and x (T, D)."""
        c_nw = self.model.condition(conditions.t, self._captions(conditions), conditions.labels)
        x_td = self.model.embed(x_tp, conditions.stretch.tokens)
        if torch.is_grad_enabled() and not x_td.requires_grad:
            # Of frozen embedders. ZeRO 3 lets go of a block's weights when the block's input has its gradient: without
            # one it would before the backward pass has used them.
            x_td.requires_grad_()
        return c_nw, x_td

    def run_blocks(self, c_nw: Tensor, x_td: Tensor, conditions: Conditions) -> Tensor:
        """x (T, D) after this stage's blocks."""
        stretch = conditions.stretch
        inputs: AttentionInputs = self.model.attention_inputs(stretch.attending, self._captions(conditions))
        for block in self.model.layers.values():
            settings = (self.recompute, self.offload, self.wait_on_host)
            x_td = run_block(block, x_td, c_nw, stretch.tokens.sample_id_t, inputs, *settings)
        return x_td

    def head(self, c_nw: Tensor, x_td: Tensor, conditions: Conditions) -> Tensor:
        """The velocity (T, P)."""
        return self.model.final_layer(x_td, c_nw, conditions.stretch.tokens.sample_id_t)

    def _captions(self, conditions: Conditions) -> Captions | None:
        dtype = next(self.model.parameters()).dtype
        return None if conditions.captions is None else conditions.captions.to(dtype=dtype)


def stage_of(model: FlagDiT, parallel: ParallelConfig, mesh: Mesh) -> tuple[Stage, dict[str, Part]]:
    """What this rank has of `model`, which is taken over; and of each cut parameter, by its public name, which part."""
    parts: dict[str, Part] = {}
    blocks = cut(stage_costs(model), mesh.pipeline.size)[mesh.pipeline.rank]
    if mesh.tensor.size > 1:
        from lumina.parallel.tensor import parallelize_tensor  # Megatron-core takes seconds to import

        parts = parallelize_tensor(model, mesh)
    return Stage(model, blocks, mesh, recompute=parallel.recompute, offload=parallel.offload_activations), parts
