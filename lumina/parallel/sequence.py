"""One pack over several ranks: contiguous stretches of its tokens, of any length, cut without padding."""

from dataclasses import dataclass

from lumina.model.tokens import Layout
from lumina.parallel.cuts import bounds
from lumina.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Stretch:
    """This rank's tokens of a pack.

    start, stop: the tokens that it embeds, holds between blocks and is scored on.
    tokens: what these are.
    attending: what the tokens are that its attention works on: the same, or under Megatron sequence parallel those of
        all tensor-parallel ranks, which share heads instead of tokens there.
    """

    start: int
    stop: int
    tokens: Layout
    attending: Layout


def stretch_of(layout: Layout, mesh: Mesh) -> Stretch:
    """This rank's stretch of a pack: the Ulysses ranks of a ring rank are neighbours, tensor ranks innermost."""
    total, ring, ulysses = len(layout.kind_t), mesh.ring, mesh.ulysses
    place = ring.rank * ulysses.size + ulysses.rank
    start, stop = bounds(total, ring.size * ulysses.size)[place : place + 2]
    attending = layout if stop - start == total else layout.stretch(start, stop)
    if not mesh.sequence_parallel:
        return Stretch(start, stop, attending, attending)
    first, last = bounds(stop - start, mesh.tensor.size)[mesh.tensor.rank : mesh.tensor.rank + 2]
    return Stretch(start + first, start + last, attending.stretch(first, last), attending)
