"""The real model under its real layout, forward and backward, for one rank of any number, without hardware.

Tensors are torch's fake ones, which have shapes and no values, and process groups its fake ones, over which nothing
travels. What is counted is what the code does: which tensors live when, and what is handed to which group. Not
simulated is what the engine keeps beside it: optimizer state, gradient sums, ZeRO's buffers and messages.
"""

import gc
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lumina.benchmark import record
from lumina.benchmark.live_bytes import CUDA_UNIT, LiveBytes
from lumina.benchmark.recorded_messages import nbytes, recorded_messages
from lumina.config.schema import Config
from lumina.flow.loss import Objective
from lumina.kernels import AttentionPlan
from lumina.kernels.attention_lse_backends import offsets
from lumina.kernels.dispatch import gpu_assumed
from lumina.kernels.triton_support import triton
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import Captions, Layout, Shape, layout_of
from lumina.parallel.layout import accumulation_steps, check_layout
from lumina.parallel.mesh import Mesh
from lumina.parallel.pipeline import PipelineStage
from lumina.parallel.sequence import Stretch, stretch_of
from lumina.parallel.simulated_mesh import simulated_mesh
from lumina.parallel.stage import stage_of
from lumina.planner.memory import meta_model
from lumina.planner.messages import RECEIVE, SEND, Message, Messages
from lumina.train.prepare import TrainingPack

_SHAPE_MESSAGE = 256 * 4
"""Bytes in which DeepSpeed's pipeline announces the shapes of what it sends (TENSOR_META_SIZE int32)."""


@dataclass(frozen=True)
class Simulated:
    """What a rank would hold and send. Bytes; the packs themselves are in none of them.

    tokens: of a forward pass, on this rank, between blocks.
    weights: parameters in the run's precision, as without ZeRO.
    kept: what waits for the backward pass after one forward, beyond weights.
    peak: the most of the micro-batches under way, beyond weights and the sums of gradients: `kept` of each, the
        gradients and other tensors of one backward pass as they come and go, and what a pipeline receives into.
    messages: of one micro-batch, forward and backward, with those between pipeline stages.
    """

    rank: int
    stage: int
    tokens: int
    weights: int
    kept: int
    peak: int
    messages: Messages


def simulate(
    config: Config,
    sizes: FlagDiTConfig,
    world: int,
    rank: int,
    shapes: Sequence[Shape],
    text_tokens: Sequence[int] = (),
    *,
    device: str = "cuda",
) -> Simulated:
    """Rank `rank` of `world` on packs of samples of these latent `shapes` (F, C, H, W), `train.packs_per_forward` at a
    time.

    On "cuda" the kernels are those of an A100 with torch's own attention, whatever this machine has, and memory is
    counted in the allocator's blocks of 512 bytes; on "cpu" they are the plain ones, which keep more, and activations
    that are offloaded stay where they are. What one operation takes and gives back within itself is not counted.

    Args:
        text_tokens: of the caption of each sample; none of a label-conditional model.

    Raises:
        ValueError: for a layout that cannot run (`check_layout`), conditions that the model does not take, or where
            this process has process groups; on "cuda", without Triton.
    """
    check_layout(config, sizes, world)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"a simulation is of a device cpu or cuda, not {device}")
    if device == "cuda" and triton is None:
        raise ValueError("what a GPU's kernels keep is known with Triton alone, which Linux has; simulate device cpu")
    if not shapes or len(text_tokens) != (len(shapes) if sizes.text_conditional else 0):
        kind, takes = ("text", "a caption of each") if sizes.text_conditional else ("label", "no captions")
        raise ValueError(
            f"{len(shapes)} samples and {len(text_tokens)} captions are no pack of a {kind}-conditional model: "
            f"it takes at least one sample, and {takes}"
        )
    at_once = config.train.packs_per_forward
    host = torch.device("cpu")
    layout = layout_of(list(shapes) * at_once, sizes.patch_size, sizes.text_conditional, host)
    kernels, unit = (gpu_assumed(), CUDA_UNIT) if device == "cuda" else (nullcontext(), 1)
    offsets.cache_clear()
    try:
        with simulated_mesh(config.parallel, world, rank, host) as mesh, kernels:
            stretch = stretch_of(layout, mesh)  # by values: of real tensors
            with FakeTensorMode(), LiveBytes(unit) as live, warnings.catch_warnings():
                # torch's new names for collectives that it still has by the old ones: nothing a user can act on.
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
                pack = _pack(layout, stretch, tuple(text_tokens) * at_once, sizes, host)
                batches = MicroBatches(config, sizes, mesh, pack, live)
                if device == "cuda":
                    batches.stage.wait_on_host = _Elsewhere
                return batches.run()
    finally:
        offsets.cache_clear()


def described(simulated: Simulated) -> str:
    """Tables: memory, messages."""
    memory = [(name, f"{getattr(simulated, name) / 2**20:,.1f}") for name in ("weights", "kept", "peak")]
    messages = [
        (message.axis, message.operation, f"{message.bytes:,}", f"{count:,}")
        for message, count in sorted(simulated.messages.items())
    ]
    where = f"rank {simulated.rank}, stage {simulated.stage}, {simulated.tokens:,} tokens"
    tables = [record.table([where, "MiB"], memory)]
    if messages:
        tables.append(record.table(["axis", "operation", "bytes", "messages of a micro-batch"], messages))
    return "\n\n".join(tables)


def _pack(
    layout: Layout, stretch: Stretch, text_tokens: tuple[int, ...], sizes: FlagDiTConfig, device: torch.device
) -> TrainingPack:
    """This rank's part of a pack, of no values."""
    tokens = _like(stretch.tokens, device)
    attending = tokens if stretch.attending is stretch.tokens else _like(stretch.attending, device)
    count, rows = len(layout.lengths), stretch.stop - stretch.start
    captions = labels = None
    if sizes.text_conditional:
        features = torch.empty(sum(text_tokens), sizes.cap_feat_dim, device=device)
        captions = Captions(features, text_tokens, torch.empty(len(features), dtype=torch.long, device=device))
    else:
        labels = torch.empty(count, dtype=torch.long, device=device)
    width = sizes.in_channels * sizes.patch_size**2
    return TrainingPack(
        data=torch.empty(rows, width, device=device),
        noise=torch.empty(rows, width, device=device),
        t=torch.empty(count, device=device),
        layout=layout,
        stretch=Stretch(stretch.start, stretch.stop, tokens, attending),
        captions=captions,
        labels=labels,
    )


def _like(layout: Layout, device: torch.device) -> Layout:
    """A layout with tensors of the same shapes."""
    names = ("kind_t", "position_t", "sample_id_t", "patch_index")
    real = {name: getattr(layout, name) for name in names}
    tensors = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in real.items()}
    plan = AttentionPlan(layout.attention.query_lengths, layout.attention.key_lengths, device)
    return replace(layout, attention=plan, **tensors)


class MicroBatches:
    """One rank's work on the micro-batches that are under way at once; on tensors and a mesh that are fake, or real."""

    def __init__(self, config: Config, sizes: FlagDiTConfig, mesh: Mesh, pack: TrainingPack, live: LiveBytes):
        """`live` is on, and has seen the pack being made."""
        self.mesh, self.pack, self.live = mesh, pack, live
        self._objective = Objective.build(**config.flow.model_dump())
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        model = meta_model(sizes)
        for module in model.modules():  # before hooks are laid on parameters
            for name, shape in module.named_parameters(recurse=False):
                values = torch.zeros(shape.shape, dtype=dtype, device=mesh.device)
                setattr(module, name, nn.Parameter(values, shape.requires_grad))
        with mesh.device:
            self.stage, _ = stage_of(model, config.parallel, mesh)
        self.staged = PipelineStage(self.stage, mesh.activity) if mesh.pipeline.size > 1 else None
        for parameter in self.stage.parameters():
            if parameter.requires_grad:  # the engine takes it for its sums
                parameter.register_post_accumulate_grad_hook(_let_go)
        steps = accumulation_steps(config, mesh.data.size)
        self._under_way = min(steps, mesh.pipeline.size - mesh.pipeline.rank)
        between = ((len(pack.t), sizes.condition_width), (len(pack.data), sizes.dim)) if self.staged else ()
        self._between = [torch.Size(shape) for shape in between]
        self._dtype = dtype

    def run(self) -> Simulated:
        """So many passes forward as are ahead of the first backward (one forward, one backward), and that one."""
        mesh, live = self.mesh, self.live
        weights = sum(nbytes(parameter) for parameter in self.stage.parameters())
        gc.collect()
        base, live.peak = live.live, live.live
        # What DeepSpeed receives into: c and x, then their gradients.
        buffers = [torch.zeros(shape, dtype=self._dtype, device=mesh.device) for shape in self._between]
        before = live.live
        with recorded_messages(mesh) as forward:
            waiting = [self._forward(buffers)]
        kept = live.live - before
        waiting += [self._forward(buffers) for _ in range(self._under_way - 1)]
        with recorded_messages(mesh) as backward:
            self._backward(waiting[0], buffers)
        messages = Messages(forward + backward + self._between_stages(buffers))
        tokens = len(self.pack.data)
        return Simulated(mesh.world.rank, mesh.pipeline.rank, tokens, weights, kept, live.peak - base, messages)

    def _forward(self, buffers: list[Tensor]) -> "_Waiting":
        if self.staged is None:
            return _Waiting((), (self._loss(self.stage(self._noised(self.pack), self.pack)),))
        received: tuple[Tensor, ...] = ()
        given = torch.zeros((), device=self.mesh.device)
        if not self.stage.has_first:
            received = tuple(buffer.clone().requires_grad_() for buffer in buffers)
            given = tuple(tensor.clone() for tensor in received)  # DeepSpeed's, too
        self.staged.load([self.pack], self._noised)
        outputs = self.staged(given)
        return _Waiting(received, (self._loss(outputs),) if self.stage.has_last else outputs)

    def _backward(self, waiting: "_Waiting", buffers: list[Tensor]) -> None:
        if self.stage.has_last:
            waiting.outputs[0].backward()
            return
        last = len(buffers) - 1
        for index, (output, gradient) in enumerate(zip(waiting.outputs, buffers, strict=True)):
            output.backward(gradient, retain_graph=index < last)

    def _noised(self, pack: TrainingPack) -> Tensor:
        return self._objective.corrupt(pack.data, pack.noise, pack.t_of_token)

    def _loss(self, output: Tensor) -> Tensor:
        pack = self.pack
        errors = self._objective.squared_error(output, pack.data, pack.noise, pack.t_of_token)
        # In one sum what is a mean of each sample: `TrainingPack.per_sample` looks at values.
        return errors.where(pack.stretch.tokens.is_patch_t[:, None], 0.0).mean(dim=1).sum()

    def _between_stages(self, buffers: list[Tensor]) -> Messages:
        """Activations, with their shapes before them, on to the next stage, and gradients back."""
        messages = Messages()
        sizes = [nbytes(buffer) for buffer in buffers]
        for there, on, back in ((not self.stage.has_last, SEND, RECEIVE), (not self.stage.has_first, RECEIVE, SEND)):
            if there:
                messages.update(Message("pipeline", on, size) for size in (_SHAPE_MESSAGE, *sizes))
                messages.update(Message("pipeline", back, size) for size in sizes)
        return messages


@dataclass(frozen=True)
class _Waiting:
    """A micro-batch between forward and backward, as the pipeline engine holds it: the loss is the last stage's
    output."""

    received: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


class _Elsewhere(saved_tensors_hooks):
    """`save_on_cpu` where all tensors are on the CPU: of what waits, nothing is there that would be counted."""

    def __init__(self, pin_memory: bool):
        def away(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            return tensor.shape, tensor.dtype

        def back(waiting: tuple[torch.Size, torch.dtype]) -> Tensor:
            shape, dtype = waiting
            return torch.empty(shape, dtype=dtype)

        super().__init__(away, back)
