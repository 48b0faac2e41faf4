"""DeepSpeed, behind the few calls that training needs. The only module that imports it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

# DeepSpeed announces its accelerator and every setting on import and initialisation.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

import torch
from torch import Tensor

from lumina.config.deepspeed import deepspeed_config
from lumina.config.schema import Config
from lumina.model.flag_dit import Block, FlagDiT
from lumina.parallel.fragments import Fragment, fragments_of
from lumina.parallel.mesh import Mesh

deepspeed.utils.logger.setLevel(logging.ERROR)
# torch's new names for collectives that DeepSpeed calls by the old ones: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did: the gradient norm before clipping, and whether the step was skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """A Flag-DiT trained by DeepSpeed: called as the model is, then `backward` per forward and `step` per step."""

    def __init__(self, model: FlagDiT, config: Config, mesh: Mesh, accumulation_steps: int):
        """`model` holds the fp32 weights to start from, the same on every rank; it is taken over."""
        self.mesh = mesh
        self.frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train = config.train
        settings = {
            "lr": train.learning_rate,
            "betas": train.betas,
            "eps": train.adam_epsilon,
            "weight_decay": train.weight_decay,
        }
        if config.parallel.zero_stage == 0:
            self._optimizer = ClippedAdamW(trained, clip_norm=train.clip_norm, **settings)
        else:
            self._optimizer = torch.optim.AdamW(trained, **settings)
        if config.parallel.zero_stage == 3:
            # Blocks hand the weights of their norms to fused operations, past the norms' own forward, where ZeRO 3
            # would gather them: it gathers a whole block at once instead.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        # Building its shared-memory collective takes a compiler and half a minute, and no collective of ours uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=deepspeed_config(config, accumulation_steps)
            )
        self.fragments: list[Fragment] = fragments_of(self._engine)
        self._pending = False

    def __call__(self, *args, **kwargs) -> Tensor:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this forward's share of the global loss: shares of all ranks are summed."""
        if self._pending:
            self._engine.step()  # not yet the boundary: DeepSpeed counts forwards by these calls
        # DeepSpeed averages over ranks and forwards; our shares already carry their weight.
        self._engine.backward(loss * self.mesh.data_size, scale_wrt_gas=False)
        self._pending = True

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the gradients; on every rank alike a non-finite norm skips the step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._pending = False
        optimizer = self._engine.optimizer
        return StepOutcome(grad_norm=float(optimizer._global_grad_norm), skipped=bool(optimizer.overflow))

    def close(self) -> None:
        """Let go of hooks and process groups, so that another run can start in this process."""
        self._engine.destroy()
        deepspeed.comm.destroy_process_group()
        # DeepSpeed keeps its backend, with the groups that are gone, and would use it for the next engine.
        deepspeed.comm.comm.cdb = None

    @property
    def optimizer_steps(self) -> int:
        """Adam's count of the steps it has taken, on which its bias correction depends."""
        state = next(iter(self._optimizer.state.values()), None)
        return int(state["step"]) if state else 0

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Adam's moments of a fragment, as flat views; made where no step was taken yet."""
        state = self._state_of(fragment.flat)
        return {name: fragment.view_in(state[name].view(-1)) for name in ("exp_avg", "exp_avg_sq")}

    def restore(self, read: Callable[[str, Fragment], Tensor], optimizer_steps: int) -> None:
        """Put masters and moments in place: `read(kind, fragment)` gives the flat values, fp32.

        The model was built with the same weights, so the working copies agree with the masters already.
        """
        for fragment in self.fragments:
            fragment.master.copy_(read("master", fragment))
            for name, values in self.moments(fragment).items():
                values.copy_(read(name, fragment))
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_steps))

    def _state_of(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[flat]
        if not state:  # as torch's AdamW makes it at its first step
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)
        return state


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by global norm and skips non-finite steps, for ZeRO 0.

    DeepSpeed's ZeRO optimizers do both; without them it would clip without telling the norm and write a NaN into
    the weights. `_global_grad_norm` and `overflow` are the names under which it looks for an optimizer's findings.
    """

    def __init__(self, parameters: list[Tensor], *, clip_norm: float, **settings):
        super().__init__(parameters, **settings)
        self._parameters, self._clip_norm = parameters, clip_norm
        self._global_grad_norm = 0.0
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Gradients are already averaged over ranks, so every rank finds the same norm."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if not self.overflow:
            super().step()
