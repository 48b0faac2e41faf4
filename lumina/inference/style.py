"""One style for many samples: each sees, in self-attention, the tokens of a leading sample beside its own.

The idea is StyleAligned's (arXiv 2312.02133, section 4.1) without its normalisation; Lumina-Next (arXiv 2406.18583)
has it under the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from lumina.flow.path import Path
from lumina.model.reach import SharedKeys
from lumina.model.tokens import Layout


@dataclass(frozen=True)
class Style:
    """Where the style comes from.

    reference: a picture; None: the first sample of the call, which is drawn as if alone.
    prompt: what the reference shows; without a reference there is none.
    seed: of the noise through which the reference goes.

    Raises:
        ValueError: for a prompt without a reference.
    """

    reference: Image.Image | None = None
    prompt: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.reference is None and self.prompt:
            raise ValueError("a style without a reference picture has no prompt; it is the first sample's")


def shared_keys(layout: Layout, halves: int, leader: int) -> SharedKeys:
    """Each sample sees the leading one of its own half beside itself, which sees itself alone.

    Args:
        halves: 2 of a batch doubled for guidance.
        leader: its number within its half.
    """
    count = len(layout.lengths) // halves
    leading = [i // count * count + leader for i in range(len(layout.lengths))]
    return SharedKeys.of(layout, [[i] if i == lead else [lead, i] for i, lead in enumerate(leading)])


def known_sample(path: Path, latents: Tensor, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """Of data (M, F, C, H, W) the states x_t on its way from that noise, as a function of the time."""

    def at(t: Tensor) -> Tensor:
        times = t[:1].expand(len(latents))
        return path.interpolate(latents, noise, times)

    return at
