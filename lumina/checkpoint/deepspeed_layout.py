"""How DeepSpeed flattens parameters and cuts the result between ranks; nothing here reads a file.

ZeRO 1 and 2 flatten the parameters of a group one after another, aligned where it says so, and cut the result into as
many stretches as there are ranks. ZeRO 3 cuts each parameter into equal shares, the last one padded, and a rank's flat
tensor holds its share of each, one after another.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import NamedTuple

FROZEN = "pad_token"
"""The one parameter of a Flag-DiT that is not trained."""
# A group's end is aligned to a few elements a rank.
_ALIGNMENT = 64


class Piece(NamedTuple):
    """Elements [start, start + numel) of a rank's flat tensor of a group."""

    rank: int
    group: int
    start: int
    numel: int


Groups = Sequence[dict[str, tuple[int, ...]]]
Cut = list[tuple[str, tuple[int, ...], list[Piece]]]
"""Name, shape and pieces of each parameter, the pieces in order."""


def cut_groups(groups: Groups, sizes: Sequence[Sequence[int]], paddings: Sequence[Sequence[int]]) -> Cut:
    """ZeRO 1 and 2.

    Args:
        groups: shapes by name, in the order in which they are flattened.
        sizes: elements of each rank's flat tensor of each group, by rank.
        paddings: elements that nobody owns behind each parameter of each group.

    Raises:
        ValueError: for parameters that do not fit into the flat tensors.
    """
    if any(len(of_rank) != len(groups) for of_rank in sizes) or list(map(len, paddings)) != list(map(len, groups)):
        raise ValueError("its files do not agree on the parameter groups")
    cut: Cut = []
    for index, (group, behind) in enumerate(zip(groups, paddings, strict=True)):
        starts = [0, *accumulate(of_rank[index] for of_rank in sizes)]
        offset = 0
        for (name, shape), padding in zip(group.items(), behind, strict=True):
            stop = offset + prod(shape)
            if stop > starts[-1]:
                raise ValueError(f"{name} reaches beyond the {starts[-1]} values of its group")
            pieces = []
            for rank, start in enumerate(starts[:-1]):
                first, last = max(offset, start), min(stop, starts[rank + 1])
                if first < last:
                    pieces.append(Piece(rank, index, first - start, last - first))
            cut.append((name, shape, pieces))
            offset = stop + padding
        if starts[-1] - offset > _ALIGNMENT * len(sizes):
            raise ValueError(f"{starts[-1] - offset} of the {starts[-1]} values of a parameter group are nobody's")
    return cut


def cut_parameters(groups: Groups, sizes: Sequence[Sequence[int]]) -> Cut:
    """ZeRO 3, whose groups are one long row on each rank; arguments as of `cut_groups`.

    Raises:
        ValueError: for parameters that do not fill the flat tensors.
    """
    if any(list(of_rank) != list(sizes[0]) for of_rank in sizes):
        raise ValueError("its ranks have flat tensors of different sizes")
    world, starts = len(sizes), [0, *accumulate(sizes[0])]
    cut: Cut = []
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        share = -(-prod(shape) // world)
        if offset + share > starts[-1]:
            raise ValueError(f"{name} reaches beyond the {starts[-1]} values that a rank has")
        pieces = []
        for rank in range(world):
            stop = offset + min(share, max(0, prod(shape) - rank * share))
            for group, start in enumerate(starts[:-1]):
                first, last = max(offset, start), min(stop, starts[group + 1])
                if first < last:
                    pieces.append(Piece(rank, group, first - start, last - first))
        cut.append((name, shape, pieces))
        offset += share
    if offset != starts[-1]:
        raise ValueError(f"{starts[-1] - offset} of the {starts[-1]} values that a rank has are nobody's")
    return cut


def prefix(names: list[str], path: Path) -> str:
    """What stands before every public name, as `module.` of a model that was wrapped."""
    found = [name.removesuffix("x_embedder.weight") for name in names if name.endswith("x_embedder.weight")]
    if len(found) != 1 or not all(name.startswith(found[0]) for name in names):
        raise ValueError(f"{path}: has no tensor x_embedder.weight; these are not the weights of a Flag-DiT")
    return found[0]


Places = dict[str, tuple[int, int, int]]
"""Parameter group, number in it and first element, by name."""


def owners_of(known: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[tuple[int, ...]]]) -> Places | None:
    """Where each trained parameter is among `groups` of tensors of the given shapes, whose names no file tells.

    A group's tensors are in the order of the model, `known`; None where shapes do not tell the groups apart.
    """
    total = sum(map(len, groups))
    names = [name for name in known if total == len(known) or name != FROZEN]
    if total != len(names):
        return None
    at, owners = [0] * len(groups), {}
    for name in names:
        fitting = [g for g, group in enumerate(groups) if at[g] < len(group) and group[at[g]] == known[name]]
        if len(fitting) != 1:
            return None
        owners[name] = (fitting[0], at[fitting[0]], 0)
        at[fitting[0]] += 1
    return owners


def stretches_of(known: Mapping[str, tuple[int, ...]], sizes: Sequence[int]) -> Places | None:
    """As `owners_of`, of flat tensors of the given sizes, one a group; they do not tell more groups than one apart."""
    for names in (list(known), [name for name in known if name != FROZEN]):
        starts = [0, *accumulate(prod(known[name]) for name in names)]
        if [starts[-1]] == list(sizes):
            return {name: (0, 0, start) for name, start in zip(names, starts, strict=False)}
    return None
