"""Captions on regions: parts of a sample follow captions of their own, and its self-attention holds it together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lumina.model.reach import CaptionGroups
from lumina.model.tokens import Captions, Layout

CaptionTokens = Float[Tensor, "_l _width"]


@dataclass(frozen=True)
class Region:
    """A caption and the box that it is for, in shares of the width (left, right) and height (top, bottom).

    Raises:
        ValueError: for a box that is empty or not within 0 and 1, or a caption that is empty.
    """

    prompt: str
    left: int | float
    top: int | float
    right: int | float
    bottom: int | float

    def __post_init__(self):
        box = (self.left, self.top, self.right, self.bottom)
        if not all(math.isfinite(side) for side in box) or not (
            0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1
        ):
            raise ValueError(
                f"the box of region {self.prompt!r} is {' '.join(f'{side:g}' for side in box)}; it is left, top, right "
                "and bottom, as shares of the width and height, with 0 ≤ left < right ≤ 1 and 0 ≤ top < bottom ≤ 1"
            )
        if not self.prompt.strip():
            raise ValueError("a region has no caption; say what is to be drawn there")


def caption_groups(
    layout: Layout,
    regions: Sequence[Region],
    captions: Sequence[CaptionTokens],
    of_regions: Sequence[CaptionTokens],
    composed: int,
) -> CaptionGroups:
    """Which caption each token follows.

    A patch lies in the regions that its middle lies in and follows their captions, all of them where they overlap; in
    none, its sample's own. A nextline token goes with the last patch of its row. Regions are the same in every frame;
    a nextframe token follows the sample's own caption.

    Args:
        captions: of all samples of the layout.
        of_regions: of the regions.
        composed: the first so many samples have regions; the others, what guidance leads away from, follow their
            own caption throughout.

    Raises:
        ValueError: for a region in which no patch has its middle.
    """
    group_t, sample_g, texts = [], [], []
    for sample, (shape, caption) in enumerate(zip(layout.shapes, captions, strict=True)):
        covered = _covered(shape, layout.patch_size, regions) & (sample < composed)
        kinds, which = covered.unique(dim=0, return_inverse=True)
        group_t.append(which + len(texts))
        for kind in kinds:
            inside = [text for text, within in zip(of_regions, kind.tolist(), strict=True) if within]
            texts.append(torch.cat(inside) if inside else caption)
            sample_g.append(sample)
    device = layout.position_t.device
    of_groups = Captions.of(torch.cat(texts), tuple(len(text) for text in texts))
    return CaptionGroups(torch.cat(group_t).to(device), of_groups, torch.tensor(sample_g, device=device))


def _covered(shape: tuple[int, int, int, int], patch_size: int, regions: Sequence[Region]) -> Bool[Tensor, "t r"]:
    """Which regions each token of a sample lies in."""
    frames, _, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    y = ((torch.arange(rows) + 0.5) / rows)[:, None]
    x = ((torch.arange(columns) + 0.5) / columns)[None]
    of_frame = torch.stack(
        [(region.left <= x) & (x < region.right) & (region.top <= y) & (y < region.bottom) for region in regions], -1
    )
    for region, patches in zip(regions, of_frame.flatten(0, 1).sum(0).tolist(), strict=True):
        if patches == 0:
            raise ValueError(
                f"region {region.prompt!r} holds the middle of no patch; make it larger: a patch is 1/{columns} of the "
                f"width and 1/{rows} of the height"
            )
    with_nextlines = torch.cat((of_frame, of_frame[:, -1:]), dim=1).flatten(0, 1)
    nextframe = torch.zeros(1, len(regions), dtype=torch.bool)
    return torch.cat((with_nextlines, nextframe)).repeat(frames, 1)[:-1]
