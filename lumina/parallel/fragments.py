"""Where the fp32 master of each parameter lives: which stretch of it this rank owns, as a view.

ZeRO flattens parameters and cuts the result between ranks. Seen by parameter, each rank owns one contiguous stretch
of some of them; EMA, checkpoints and health checks work on these stretches and need not know the stage.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Indices [start, stop) along `dim` of a tensor: what a tensor-parallel rank holds of it."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter that this rank trains: all of it, or its part."""

    name: str
    """The public one."""
    parameter: Tensor
    shape: tuple[int, ...]
    """Of the whole."""
    part: Part | None


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, start + numel) of the flattened part that this rank trains of the parameter `name`."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    part: Part | None
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

    def cut(self, whole: Tensor) -> Tensor:
        """The fragment's flat values in the whole parameter."""
        held = whole if self.part is None else whole.narrow(self.part.dim, self.part.start, self._held)
        return held.reshape(-1)[self.start : self.start + self.numel]

    def place_in(self, whole: Tensor, values: Tensor) -> None:
        """Write the fragment's flat values to where they belong in the whole parameter."""
        held = whole if self.part is None else whole.narrow(self.part.dim, self.part.start, self._held)
        flat = held.reshape(-1)
        flat[self.start : self.start + self.numel] = values
        held.copy_(flat.view_as(held))

    @property
    def _held(self) -> int:
        return self.part.stop - self.part.start


class Held(NamedTuple):
    """Values that stay as they are from one step of the optimizer to the next."""

    kind: str
    """master, exp_avg, exp_avg_sq, ema, or working copy: what forward passes use where that is not the master."""
    name: str
    """Of the parameter."""
    values: Tensor
    """Flat: this rank's."""
    replicated: bool
    """Whether all ranks of the gradient axis hold the same."""


def fragments_of(engine: Any, trained: Iterable[Trained]) -> list[Fragment]:
    """The fragments that this rank owns of the parameters of a DeepSpeed engine, in the order of `trained`."""
    stage = engine.zero_optimization_stage()
    find = {0: _of_whole, 1: _of_partition, 2: _of_partition, 3: _of_stage_3}[stage]
    fragments = []
    for entry in trained:
        place = find(engine.optimizer, entry.parameter)
        if place is not None:
            start, flat, offset, numel = place
            fragments.append(Fragment(entry.name, entry.shape, entry.part, start, flat, offset, numel))
    return fragments


# Each: where a parameter's fragment starts, the optimizer's tensor with it, its offset there, its length.
_Place = tuple[int, Tensor, int, int]


def _of_whole(optimizer: Any, parameter: Tensor) -> _Place:
    return 0, parameter, 0, parameter.numel()


def _of_partition(optimizer: Any, parameter: Tensor) -> _Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # the parameter lies wholly in other ranks' partitions
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
    return low.start, flat, high.start, high.numel


def _of_stage_3(optimizer: Any, parameter: Tensor) -> _Place | None:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    partition = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * partition
    numel = min(partition, parameter.ds_numel - start)  # the last rank's stretch is padded
    if numel <= 0:
        return None
    return start, optimizer.fp32_partitioned_groups_flat[group], offset, numel
