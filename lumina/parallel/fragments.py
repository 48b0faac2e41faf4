"""Where the fp32 master of each parameter lives: which stretch of it this rank owns, as a view.

ZeRO flattens parameters and cuts the result between ranks. Seen by parameter, each rank owns one contiguous stretch
of some of them; EMA, checkpoints and health checks work on these stretches and need not know the stage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, owned by this rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor  # the optimizer's tensor that holds the fragment
    offset: int  # of the fragment in `flat`
    numel: int

    def view_in(self, flat: Tensor) -> Tensor:
        """The fragment in a tensor laid out as `flat`: the master itself, a moment."""
        return flat.narrow(0, self.offset, self.numel)

    @property
    def master(self) -> Tensor:
        """The fp32 values, a view: writing to it changes the optimizer's copy."""
        return self.view_in(self.flat.detach().view(-1))

    @property
    def whole(self) -> bool:
        return self.numel == torch.Size(self.shape).numel()


def fragments_of(engine: Any) -> list[Fragment]:
    """The fragments that this rank owns of every trained parameter of a DeepSpeed engine, in model order."""
    stage = engine.zero_optimization_stage()
    find = {0: _of_whole, 1: _of_partition, 2: _of_partition, 3: _of_stage_3}[stage]
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    fragments = [find(engine.optimizer, name, parameter) for name, parameter in trained]
    return [fragment for fragment in fragments if fragment is not None]


def _of_whole(optimizer: Any, name: str, parameter: Tensor) -> Fragment:
    return Fragment(name, tuple(parameter.shape), 0, parameter, 0, parameter.numel())


def _of_partition(optimizer: Any, name: str, parameter: Tensor) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # the parameter lies wholly in other ranks' partitions
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(name, tuple(parameter.shape), low.start, flat, high.start, high.numel)


def _of_stage_3(optimizer: Any, name: str, parameter: Tensor) -> Fragment | None:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    partition = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * partition
    numel = min(partition, parameter.ds_numel - start)  # the last rank's stretch is padded
    if numel <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return Fragment(name, tuple(parameter.ds_shape), start, flat, offset, numel)
