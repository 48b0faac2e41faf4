"""DeepSpeed, behind the few calls that training needs. The only module that imports it."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

# DeepSpeed announces its accelerator and every setting on import and initialisation.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.schedule import OptimizerStep, PipeInstruction, TrainSchedule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

import torch
from torch import Tensor, nn

from lumina.config.deepspeed import deepspeed_config
from lumina.config.schema import Config
from lumina.model.flag_dit import Block, FlagDiT
from lumina.parallel.activity import Phase
from lumina.parallel.fragments import Fragment, Held, Trained, fragments_of
from lumina.parallel.mesh import Mesh
from lumina.parallel.optimizer import optimizer_of
from lumina.parallel.pipeline import PipelineStage
from lumina.parallel.stage import Conditions, stage_of

deepspeed.utils.logger.setLevel(logging.ERROR)
# torch's new names for collectives that DeepSpeed calls by the old ones: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did: the gradient norm before clipping, and whether the step was skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """A Flag-DiT trained by DeepSpeed under any layout: `accumulate` gradients over packs, then `step`."""

    def __init__(
        self,
        model: FlagDiT,
        config: Config,
        mesh: Mesh,
        accumulation_steps: int,
        kept_elsewhere: Collection[str] = (),
    ):
        """
        Args:
            model: holds the fp32 weights to start from, the same on every rank; it is taken over.
            kept_elsewhere: parameters, not trained, that nobody will ask `frozen` for.
        """
        self.mesh, parallel = mesh, config.parallel
        self._accumulation_steps = accumulation_steps
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and n not in kept_elsewhere}
        self.frozen = {name: parameter.detach().clone() for name, parameter in frozen.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        stage, parts = stage_of(model, parallel, mesh)
        trained = [
            Trained(name, parameter, shapes[name], parts.get(name))
            for name, parameter in stage.model.named_parameters()
            if parameter.requires_grad
        ]
        self._stage, self._trained = stage, trained
        # Frozen weights that are in no checkpoint stay as they are for the whole run: if a bit flips, too.
        self._frozen_here = [(n, p) for n, p in stage.model.named_parameters() if n in kept_elsewhere]
        elements = sum(entry.parameter.numel() for entry in trained)
        self._optimizer = optimizer_of(trained, config, mesh)
        self._finite, self._spoilt = True, torch.zeros((), device=mesh.device)
        if mesh.tensor.rank > 0:
            self._watch_replicated_gradients()
        if parallel.zero_stage == 3:
            # Blocks hand the weights of their norms to fused operations, past the norms' own forward, so that ZeRO 3
            # would meet them unannounced and gather each by itself: it gathers a whole block at once instead.
            deepspeed.utils.set_z3_leaf_modules(stage, [Block])
        # Building its shared-memory collective takes a compiler and half a minute, and no collective of ours uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {"optimizer": self._optimizer, "config": deepspeed_config(config, accumulation_steps, elements)}
        with contextlib.redirect_stdout(io.StringIO()):
            # Takes over torch's process groups, which the mesh has started; a pipeline wants it before its engine does.
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            if mesh.pipeline.size > 1:
                self._pipeline = PipelineStage(stage, mesh.activity)
                module = _pipeline_module(self._pipeline, mesh, self._loss_of_last_stage)
                self._engine, *_ = deepspeed.initialize(model=module, **settings)
            else:
                self._pipeline = None
                # DeepSpeed finds its groups by the methods of an "mpu", and takes the whole world without one.
                mpu = _Groups(mesh) if mesh.world.size > 1 else None
                self._engine, *_ = deepspeed.initialize(model=stage, mpu=mpu, **settings)
        if parallel.zero_stage == 3:
            self._optimizer.norm_in_fp64 = lambda: float(self._engine.optimizer._global_grad_norm)
        self.fragments: list[Fragment] = fragments_of(self._engine, trained)
        self._zero_stage = parallel.zero_stage

    @property
    def attention_backend(self) -> str:
        """Name of what self-attention runs on."""
        return self._stage.attention_backend

    @property
    def owned(self) -> list[bool]:
        """For each fragment, whether it is this rank that writes it: one of those that hold the same."""
        first_copy = self.mesh.gradient.rank == 0 or self._zero_stage > 0
        return [first_copy and (f.part is not None or self.mesh.tensor.rank == 0) for f in self.fragments]

    def accumulate(
        self,
        packs: Sequence[Conditions],
        noised: Callable[[Conditions], Tensor],
        loss: Callable[[Conditions, Tensor], Tensor],
    ) -> float:
        """Forward and backward over `packs`; gradients add up over them, and are summed over ranks.

        Args:
            packs: this rank's, in as many forward passes as the engine was made for.
            noised: the model's input (T, P) of a pack; called where its first block is.
            loss: a pack's share of the global loss, given the model's output (T, P); called where its last block is.

        Returns:
            The loss of the packs that this rank answers for: summed over all ranks, the global loss.
        """
        assert len(packs) == self._accumulation_steps
        self._spoilt.zero_()
        run = self._run_pipeline if self._pipeline else self._run
        shares = [float(share) for share in run(packs, noised, loss)]
        self._finite = all(map(math.isfinite, shares))
        counted = self.mesh.sequence_parallel or self.mesh.tensor.rank == 0
        return sum(shares) if counted else 0.0

    def _run(self, packs: Sequence[Conditions], noised: Callable, loss: Callable) -> list[Tensor]:
        shares = []
        for index, pack in enumerate(packs):
            self.mesh.activity.enter(Phase.BATCH, batch=index)
            share = loss(pack, self._engine(noised(pack), pack))
            # DeepSpeed averages over ranks and forwards; our shares already carry their weight.
            self._engine.backward(share * self.mesh.gradient.size, scale_wrt_gas=False)
            if index < len(packs) - 1:
                self._engine.step()  # not yet the boundary: DeepSpeed counts forwards by these calls
            shares.append(share.detach())
        return shares

    def _run_pipeline(self, packs: Sequence[Conditions], noised: Callable, loss: Callable) -> list[Tensor]:
        engine, self._loss, self._shares = self._engine, loss, []
        self._packs = iter(packs)
        self._pipeline.load(packs, noised)
        numbers = [torch.tensor([index]) for index in range(len(packs))]
        engine.set_dataiterator(zip(numbers, numbers, strict=True))
        engine.module.train()
        engine._compute_loss = True
        engine.total_loss = None
        engine._exec_schedule(_Accumulate(len(packs), engine.num_stages, engine.stage_id))
        return self._shares

    def _loss_of_last_stage(self, output: Tensor, number: Tensor) -> Tensor:
        share = self._loss(next(self._packs), output)
        self._shares.append(share.detach())
        # Here DeepSpeed's averages over ranks and micro-batches cannot be switched off.
        return share * self.mesh.gradient.size * self._accumulation_steps

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the gradients; all ranks skip the step where any has a loss or gradient that is not finite."""
        self.mesh.activity.enter(Phase.OPTIMIZER)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # The norm, which is everybody's, tells of gradients. A loss may be infinite and its gradients not.
        self._optimizer.refused = self.mesh.any(not self._finite or not math.isfinite(float(self._spoilt)))
        if self._pipeline:
            self._engine._exec_optimizer_step()
        else:
            self._engine.step()
        optimizer = self._engine.optimizer
        if optimizer.overflow and getattr(optimizer, "cpu_offload", False):
            # DeepSpeed 0.19 lets go of gradients that it skips, but for those of ZeRO 2 with the optimizer on the CPU:
            # the next ones would be added to them, and no step would be finite any more.
            optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
        return StepOutcome(
            grad_norm=float(optimizer._global_grad_norm), skipped=self._optimizer.skipped or bool(optimizer.overflow)
        )

    def _watch_replicated_gradients(self) -> None:
        """A replicated parameter counts in the norm on the first tensor-parallel rank alone: look here by ourselves."""

        def look(gradient: Tensor) -> None:
            self._spoilt.add_(torch.linalg.vector_norm(gradient, torch.inf) * 0)  # 0, or NaN

        for entry in self._trained:
            if entry.part is None:
                entry.parameter.register_hook(look)

    def weights(self) -> Iterator[Tensor]:
        """What this rank holds of the working weights: of each parameter all, or, under ZeRO 3, its share."""
        for parameter in self._stage.parameters():
            yield getattr(parameter, "ds_tensor", parameter)

    def held(self) -> Iterator[Held]:
        """Everything that only a step of the optimizer changes, if anything does, as this rank has it."""
        replicated = self._zero_stage == 0
        for fragment in self.fragments:
            for kind, values in {"master": fragment.master, **self.moments(fragment)}.items():
                yield Held(kind, fragment.name, values, replicated)
        for entry in self._trained if self._zero_stage else ():
            sharded = self._zero_stage == 3
            values = entry.parameter.ds_tensor if sharded else entry.parameter.detach().view(-1)
            yield Held("working copy", entry.name, values, replicated=not sharded)
        for name, parameter in self._frozen_here:
            sharded = self._zero_stage == 3
            yield Held("frozen", name, parameter.ds_tensor if sharded else parameter.detach().view(-1), not sharded)

    def close(self, keep_groups: bool = False) -> None:
        """Let go of hooks and process groups, so that another run can start in this process.

        Args:
            keep_groups: for another engine over the same mesh.
        """
        self._engine.destroy()
        if keep_groups:
            return
        deepspeed.comm.destroy_process_group()
        # DeepSpeed keeps its backend, with the groups that are gone, and would use them for the next engine.
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups.mpu = None

    @property
    def optimizer_steps(self) -> int:
        """Adam's count of the steps it has taken, on which its bias correction depends."""
        state = next(iter(self._optimizer.state.values()), None)
        return int(state["step"]) if state else 0

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Adam's moments of a fragment, as flat views; made where no step was taken yet."""
        state = self._optimizer.state_of(fragment.flat)
        return {name: fragment.view_in(state[name].view(-1)) for name in ("exp_avg", "exp_avg_sq")}

    def restore(self, read: Callable[[str, Fragment], Tensor], optimizer_steps: int) -> None:
        """Put masters and moments in place: `read(kind, fragment)` gives the flat values, fp32.

        Moments are zero before the first step, and not asked for.
        """
        for fragment in self.fragments:
            fragment.master.copy_(read("master", fragment))
            for name, values in self.moments(fragment).items():
                if optimizer_steps:
                    values.copy_(read(name, fragment))
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_steps))
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Make the working copies of the weights, on all ranks, from the masters."""
        optimizer = self._engine.optimizer
        stage = self._engine.zero_optimization_stage()
        if stage in (1, 2):
            optimizer.update_lp_params()
        elif stage == 3:
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if kept := optimizer.persistent_parameters:  # small ones, which stay gathered
                kept[0].partition(kept)
                kept[0].all_gather(kept)


class _Groups:
    """The mesh in the words by which DeepSpeed asks for it. Its "data" is whatever gradients are averaged over."""

    def __init__(self, mesh: Mesh):
        for name, axis in (
            ("data_parallel", mesh.gradient),
            ("model_parallel", mesh.tensor),
            ("tensor_model_parallel", mesh.tensor),
        ):
            setattr(self, f"get_{name}_group", lambda axis=axis: axis.group)
            setattr(self, f"get_{name}_rank", lambda axis=axis: axis.rank)
            setattr(self, f"get_{name}_world_size", lambda axis=axis: axis.size)
        self.get_data_parallel_group_ranks = lambda: list(mesh.gradient.ranks)


class _Accumulate(TrainSchedule):
    """One forward, one backward (1F1B), up to the sum of gradients; the step is called for by itself."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, OptimizerStep)]


def _pipeline_module(stage: PipelineStage, mesh: Mesh, loss: Callable[[Tensor, Tensor], Tensor]) -> PipelineModule:
    # One layer a stage: what is on each was settled by cost. DeepSpeed builds this rank's alone.
    layers = [stage if rank == mesh.pipeline.rank else nn.Identity() for rank in range(mesh.pipeline.size)]
    topology = PipeModelDataParallelTopology(mesh.pipeline.size, mesh.tensor.size, mesh.gradient.size)
    for name, axis in (("pipe", mesh.pipeline), ("data", mesh.gradient), ("model", mesh.tensor)):
        assert axis.size == 1 or list(axis.ranks) in topology.get_axis_comm_lists(name), (name, axis.ranks)
    return PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="uniform", dynamic_shape=True)
