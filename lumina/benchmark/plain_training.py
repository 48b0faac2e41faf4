"""A training step as it is commonly written around the plain Flag-DiT, on one device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.benchmark.plain_flag_dit import PlainFlagDiT
from lumina.config.schema import TrainConfig


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Latents (C, H, W), and captions (N, S, width) filled up to the longest, with which of their tokens are real."""

    latents: Sequence[Tensor]
    captions: Tensor
    caption_mask: Tensor


class PlainTraining:
    """AdamW, clipping by the global norm, and an average of the weights.

    In bf16 weights, gradients and activations are bf16, and the optimizer and the average work on fp32 masters, as
    under FSDP's mixed precision, by which the public models were trained.
    """

    def __init__(self, model: PlainFlagDiT, train: TrainConfig, precision: str, learning_rate: float):
        """`model` holds fp32 weights, and is taken over."""
        self.model, self._clip_norm, self._decay = model, train.clip_norm, train.ema_decay
        self.masters = list(model.parameters())
        if precision == "bf16":
            self.masters = [parameter.detach().clone() for parameter in self.masters]
            model.to(torch.bfloat16)
        self.averages = [parameter.detach().clone() for parameter in self.masters]
        self.optimizer = torch.optim.AdamW(
            self.masters, learning_rate, train.betas, train.adam_epsilon, train.weight_decay
        )

    def drawn(self, batch: PaddedBatch) -> tuple[list[Tensor], Tensor]:
        """Fresh noise of each sample, and times (N,)."""
        noise = [torch.randn_like(latent) for latent in batch.latents]
        return noise, torch.rand(len(noise), device=batch.captions.device)

    def step(self, batch: PaddedBatch, noise: Sequence[Tensor], t_n: Tensor) -> float:
        """The loss."""
        loss = self.differentiate(batch, noise, t_n)
        self.update()
        return loss

    def differentiate(self, batch: PaddedBatch, noise: Sequence[Tensor], t_n: Tensor) -> float:
        """The loss, whose gradients are left in the parameters. Linear path, velocity prediction."""
        pairs = list(zip(batch.latents, noise, strict=True))
        noised = [t * latent + (1 - t) * added for t, (latent, added) in zip(t_n, pairs, strict=True)]
        velocities = self.model(noised, t_n, batch.captions, batch.caption_mask)
        errors = [
            (velocity - (latent - added)).square().mean()
            for velocity, (latent, added) in zip(velocities, pairs, strict=True)
        ]
        loss = torch.stack(errors).mean()
        loss.backward()
        return float(loss.detach())

    def gradient_norm(self) -> float:
        """Over all parameters, summed in float64: torch's own sum over millions of fp32 squares is some 1e-3 off."""
        return math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in self.model.parameters()))

    def update(self) -> None:
        """Clip, step, average; gradients are gone afterwards."""
        parameters = list(self.model.parameters())
        apart = self.masters[0] is not parameters[0]
        if apart:
            for master, parameter in zip(self.masters, parameters, strict=True):
                master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, self._clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            if apart:
                for master, parameter in zip(self.masters, parameters, strict=True):
                    parameter.copy_(master)
            for average, master in zip(self.averages, self.masters, strict=True):
                average.mul_(self._decay).add_(master, alpha=1 - self._decay)
        self.optimizer.zero_grad()
        self.model.zero_grad()
