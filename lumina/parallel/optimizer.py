"""AdamW as the engine uses it: it can be told to leave a step out, and under ZeRO 0 clips by itself."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.config.schema import Config
from lumina.parallel.fragments import Trained
from lumina.parallel.mesh import Mesh

_LARGEST_NORM = torch.finfo(torch.float32).max ** 0.5


def optimizer_of(trained: list[Trained], config: Config, mesh: Mesh) -> "RefusingAdamW":
    """What DeepSpeed is given for the parameters that this rank trains."""
    train = config.train
    settings = {
        "lr": train.learning_rate,
        "betas": train.betas,
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        # One pass over the weights; the default makes whole-size temporaries for the square root and the quotient.
        "fused": mesh.device.type == "cpu",
    }
    if config.parallel.zero_stage:
        return RefusingAdamW([entry.parameter for entry in trained], **settings)
    return ClippedAdamW(trained, mesh, clip_norm=train.clip_norm, **settings)


class RefusingAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing where it is `refused`, or the gradient norm is too large.

    DeepSpeed's ZeRO optimizers skip a step whose gradient norm is not finite, and know of no other reason to. They
    call this optimizer last, for each stretch of the masters: what it leaves alone stays as it is under every stage.
    """

    refused = False
    norm_in_fp64: Callable[[], float] | None = None
    """The norm of ZeRO 3, which sums squares in fp64 where the others overflow: a step must be one under all."""

    @property
    def skipped(self) -> bool:
        """Whether a step does nothing."""
        return self.refused or (self.norm_in_fp64 is not None and self.norm_in_fp64() >= _LARGEST_NORM)

    def step(self, closure: None = None) -> None:
        if not self.skipped:
            super().step()

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step count and moments, as torch's AdamW makes them at its first step where there was none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class ClippedAdamW(RefusingAdamW):
    """AdamW that clips by global norm and skips non-finite steps, for ZeRO 0.

    DeepSpeed's ZeRO optimizers do both; without them it would clip without telling the norm and write a NaN into
    the weights. `_global_grad_norm` and `overflow` are the names under which it looks for an optimizer's findings.
    """

    def __init__(self, trained: list[Trained], mesh: Mesh, *, clip_norm: float, **settings):
        self._parameters = [entry.parameter for entry in trained]
        super().__init__(self._parameters, **settings)
        # A replicated parameter counts once, a part of one on every rank: as in DeepSpeed's own norm, by its mark.
        self._counted = [
            p for p in self._parameters if getattr(p, "tensor_model_parallel", False) or mesh.tensor.rank == 0
        ]
        self._mesh, self._clip_norm = mesh, clip_norm
        self._global_grad_norm = 0.0
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Gradients are already summed over the gradient axis, so its ranks find the same norm, if none is broken."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._counted if p.grad is not None])
        mesh, norm = self._mesh, norm.to(self._mesh.device, torch.float32)
        if mesh.weights.size > 1:
            square = norm.square()
            dist.all_reduce(square, group=mesh.weights.group)
            norm = square.sqrt()
        if mesh.gradient.size > 1:
            # Replicas must agree: where one alone skipped or clipped a step otherwise, they would drift apart for good.
            finite = torch.isfinite(norm)
            worst = torch.stack((torch.where(finite, norm, 0.0), (~finite).float()))
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=mesh.gradient.group)
            norm = torch.where(worst[1] > 0, torch.inf, worst[0])
        self._global_grad_norm = float(norm)
        self.overflow = self.refused or not bool(torch.isfinite(norm))
        if not self.overflow:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
            super().step()
