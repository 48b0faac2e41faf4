"""Classifier-free guidance in sampling: how much, of which channels and when; and the network as a solver calls it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.inference.conditions import Conditions
from lumina.inference.extrapolate import ExtrapolationSettings, reached
from lumina.model.flag_dit import FlagDiT, guide

DEFAULT_GUIDANCE = 4.0


@dataclass(frozen=True)
class Guidance:
    """Where the velocity is ``uncond + scale · (cond - uncond)``; elsewhere it is ``cond``.

    scale: 1 is no guidance, 0 is unconditional.
    channels: of the latents, the first so many are guided; None: all.
    interval: (start, stop) within [0, 1]; guidance is applied at times start ≤ t ≤ stop, as the network sees them
        (arXiv 2404.07724; t = 1 is data). Outside, the network runs once on half the batch: half the cost.

    Raises:
        ValueError: for a number out of range, or channels or an interval of no guidance.
    """

    scale: float = DEFAULT_GUIDANCE
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale is {self.scale}; it must be a finite number")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"guidance_interval is {' to '.join(map(str, self.interval))}; it is two times, 0 ≤ start < stop ≤ 1 "
                "(0 is noise, 1 is data)"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guided_channels is {self.channels}; it is how many of the latents' channels, at least 1")
        if not self.used and (self.channels is not None or not self.always):
            option = "guidance_interval" if self.channels is None else "guided_channels"
            raise ValueError(f"guidance_scale is 1, which is no guidance; leave {option} out")

    @property
    def used(self) -> bool:
        """Whether there is any, so that negative conditions are needed."""
        return self.scale != 1.0

    @property
    def always(self) -> bool:
        """Whether it is applied, if at all, at every time."""
        return tuple(self.interval) == (0.0, 1.0)

    def applies(self, t: float) -> bool:
        """Whether it is applied at time t."""
        start, stop = self.interval
        return self.used and (self.always or (reached(t, start) and reached(stop, t)))

    def check_channels(self, channels: int) -> None:
        """Refuse to guide more channels than latents have.

        Raises:
            ValueError: where `channels` of the latents are fewer than are to be guided.
        """
        if self.channels is not None and self.channels > channels:
            raise ValueError(f"guided_channels is {self.channels}; the latents have {channels} channels")


def network(
    model: FlagDiT,
    conditions: Conditions,
    guidance: Guidance,
    settings: ExtrapolationSettings,
    known: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`model` as `lumina.flow.solver.sample` calls it: (x (N, ...), one time N times) to what it predicts.

    x may have fewer channels than the model, which then sees zeros in the others.

    Args:
        conditions: of the N samples, and of the known ones after them.
        known: further samples (M, ...) at a time (N,), which the others may see but nobody is told of.
    """
    timed = settings.timed or (guidance.used and not guidance.always)
    whole = model.config.in_channels

    def call(x: Tensor, t: Tensor) -> Tensor:
        time = t[0].item() if timed else 0.0  # on a GPU a wait, which is kept out of runs that do not need it
        extrapolation = settings.at(time)
        asked, channels = len(x), x.shape[-3]
        if known is not None:
            others = known(t).to(x.dtype)
            x, t = torch.cat((x, others)), torch.cat((t, t[:1].expand(len(others))))
        # What is padded the solver never sees, so that nothing grows there.
        x, t = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, whole - channels)), t.float()
        if guidance.applies(time):
            both = model(
                torch.cat((x, x)),
                torch.cat((t, t)),
                extrapolation=extrapolation,
                reach=conditions.doubled,
                **conditions.arguments,
            )
            out = guide(both, guidance.scale, guidance.channels)
        else:
            own = conditions.halved(len(x))
            out = model(x, t, extrapolation=extrapolation, reach=conditions.own, **own)
        return out[:asked, ..., :channels, :, :]

    return call
