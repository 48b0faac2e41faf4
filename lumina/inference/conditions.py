"""What the network is told of the samples that are drawn: captions or classes, captions of regions, a shared style."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.encoders.text import TextEncoder
from lumina.inference.compose import Region, caption_groups
from lumina.inference.style import shared_keys
from lumina.model.flag_dit import FlagDiT
from lumina.model.reach import OWN, Reach


@dataclass(frozen=True, eq=False)
class Conditions:
    """Of N samples, and where guidance is used of N more that it leads away from.

    arguments: the model's `cap_feats` and `cap_mask`, or `labels`.
    own, doubled: what tokens see in a call with the N samples alone, and in one with all 2N.
    """

    arguments: dict[str, Tensor]
    own: Reach = OWN
    doubled: Reach = OWN

    def halved(self, count: int) -> dict[str, Tensor]:
        """The arguments of the first `count` samples."""
        return {name: condition[:count] for name, condition in self.arguments.items()}


def text_conditions(
    model: FlagDiT,
    encoder: TextEncoder,
    prompts: Sequence[str | int],
    negative_prompt: str,
    shape: tuple[int, int, int, int],
    *,
    guided: bool,
    regions: Sequence[Region] = (),
    leader: int | None = None,
    plain: int = 0,
) -> Conditions:
    """Conditions of a text-conditional model.

    Args:
        shape: (F, C, H, W) of each sample as the model sees it.
        guided: whether there is a second half, of the negative prompt.
        regions: of all samples but the last `plain`.
        leader: the sample whose style the others share.

    Raises:
        ValueError: for prompts that are not sentences, and regions without a patch.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("this model is text-conditional: prompts are sentences")
    parameter = next(model.parameters())
    texts = list(prompts) + [negative_prompt] * len(prompts) * guided
    features, mask = encoder(texts + [region.prompt for region in regions])
    features, mask = features.to(parameter.dtype), mask.bool()
    captions = [feature[real] for feature, real in zip(features, mask, strict=True)]

    def reach(halves: int) -> Reach:
        count = len(prompts) * halves
        layout = model.layout([shape] * count, parameter.device)
        groups, keys = None, None
        if regions:
            composed = len(prompts) - plain
            groups = caption_groups(layout, regions, captions[:count], captions[len(texts) :], composed)
        if leader is not None:
            keys = shared_keys(layout, halves, leader)
        return Reach(groups, keys)

    arguments = {"cap_feats": features[: len(texts)], "cap_mask": mask[: len(texts)]}
    return Conditions(arguments, reach(1), reach(2) if guided else OWN)


def label_conditions(
    model: FlagDiT, prompts: Sequence[str | int], shape: tuple[int, int, int, int], *, guided: bool, leader: int | None
) -> Conditions:
    """Conditions of a label-conditional model; the second half is of the class "none".

    Raises:
        ValueError: for prompts that are no class of the model's.
    """
    classes, device = model.config.num_classes, next(model.parameters()).device
    labels = [_label(prompt, classes) for prompt in prompts] + [classes] * len(prompts) * guided

    def reach(halves: int) -> Reach:
        if leader is None:
            return OWN
        return Reach(keys=shared_keys(model.layout([shape] * len(prompts) * halves, device), halves, leader))

    return Conditions({"labels": torch.tensor(labels, device=device)}, reach(1), reach(2) if guided else OWN)


def _label(prompt: str | int, classes: int) -> int:
    try:
        label = int(prompt)
    except ValueError:
        label = -1
    if not 0 <= label < classes:
        raise ValueError(
            f"this model is label-conditional: a prompt is a class from 0 to {classes - 1}, not {prompt!r}"
        )
    return label
