"""What each rank of a run holds in memory, counted before anything is allocated.

Weights, masters, moments and EMA are exact to the byte, with DeepSpeed's padding; gradients are what its buffers for
them hold at their fullest; `buffers` is an upper bound of what it puts aside for a while, and `activations` an estimate
of what waits for the backward pass. Not counted: text encoder, autoencoder, CUDA's context and NCCL (one or two GiB
without the encoders), fragmentation.
"""

from dataclasses import dataclass

import torch

from lumina.config.deepspeed import REDUCE_BUCKET
from lumina.config.schema import Config, ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.parallel.cuts import ON_FIRST_STAGE, cut, kind_of, stage_costs

_FP32 = 4
_GATHERED = 10**9  # DeepSpeed's stage3_max_live_parameters
_ALIGNMENT = 2  # elements, of a flat partition of ZeRO 1 and 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank.

    weights: what forward and backward passes use, in the run's precision.
    gradients: fp32, the most of a step.
    masters: fp32; 0 where the weights are their own.
    moments: Adam's two, fp32.
    ema: the averaged weights, fp32.
    buffers: for reducing gradients and gathering weights; at most.
    activations: of the packs under way; an estimate.
    on_host: of the above, what `offload_optimizer` keeps in host memory, and of activations what waits there.
    loading: host memory with the whole model, fp32, while the rank starts.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    masters: int
    moments: int
    ema: int
    buffers: int
    activations: int
    on_host: int
    loading: int

    @property
    def states(self) -> int:
        """Weights, gradients, masters, moments and EMA, on whichever side."""
        return self.weights + self.gradients + self.masters + self.moments + self.ema

    @property
    def on_device(self) -> int:
        """All but what is in host memory."""
        return self.states + self.buffers + self.activations - self.on_host


def meta_model(sizes: FlagDiTConfig) -> FlagDiT:
    """A model that has shapes and no values."""
    with torch.device("meta"):
        return FlagDiT(sizes)


def plan_memory(config: Config, sizes: FlagDiTConfig, world: int) -> list[MemoryPlan]:
    """Of a rank of each pipeline stage; the ranks of a stage hold the same, but for padding that is counted for all.

    Args:
        world: ranks; the layout is one that `parallel.layout.check_layout` has let pass.
    """
    parallel, model = config.parallel, meta_model(sizes)
    shards = world // (parallel.tensor * parallel.pipeline)  # data × ring × ulysses
    whole = sum(parameter.numel() for parameter in model.parameters())
    blocks = cut(stage_costs(model), parallel.pipeline)
    return [_of_stage(config, sizes, model, stage, blocks, shards, whole) for stage in range(parallel.pipeline)]


def largest(plans: list[MemoryPlan]) -> MemoryPlan:
    """The one that takes most of a device."""
    return max(plans, key=lambda plan: plan.on_device)


def _of_stage(
    config: Config,
    sizes: FlagDiTConfig,
    model: FlagDiT,
    stage: int,
    blocks: list[range],
    shards: int,
    whole: int,
) -> MemoryPlan:
    parallel, width = config.parallel, 2 if config.precision == "bf16" else _FP32
    here = _parameters(model, blocks[stage], parallel.tensor)
    trained = [numel for numel, trains in here if trains]
    fixed = [numel for numel, trains in here if not trains]
    total = sum(trained)
    zero = parallel.zero_stage
    if zero == 0:
        held = share = total
    elif zero == 3:
        held = share = _sharded(trained, shards)
    else:
        unit = _ALIGNMENT * shards
        held = -(-total // unit) * unit
        share = held // shards
    weights = (held + (_sharded(fixed, shards) if zero == 3 else sum(fixed))) * width
    # ZeRO 1 keeps whole gradients until the end of a step, and then its own share of their sum beside them.
    gradients = _FP32 * {0: total, 1: total + share, 2: share, 3: share}[zero]
    masters = 0 if zero == 0 else _FP32 * share
    moments = 2 * _FP32 * share
    ema = _FP32 * min(share, total)  # without the padding, all of which is the last rank's
    bucket = min(REDUCE_BUCKET, total) * _FP32 if zero in (2, 3) else 0
    gathered = min(_GATHERED, total) * width if zero == 3 else 0
    activations, waiting = _activations(config, sizes, stage, len(blocks[stage]), width, shards)
    on_host = waiting
    if parallel.offload_optimizer:
        on_host += masters + moments + ema + _FP32 * share
    return MemoryPlan(
        stage=stage,
        parameters=total + sum(fixed),
        weights=weights,
        gradients=gradients,
        masters=masters,
        moments=moments,
        ema=ema,
        buffers=bucket + gathered,
        activations=activations,
        on_host=on_host,
        loading=_FP32 * whole,
    )


def _sharded(counts: list[int], shards: int) -> int:
    """Elements of one of `shards` equal shares of each, padded."""
    return sum(-(-count // shards) for count in counts)


def _parameters(model: FlagDiT, blocks: range, tensor: int) -> list[tuple[int, bool]]:
    """Of each parameter on a pipeline stage: how many elements a tensor-parallel rank has, and whether it trains."""
    found = []
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".")
        if head == "layers":
            there = int(rest.partition(".")[0]) in blocks
        elif head in ON_FIRST_STAGE:
            there = blocks.start == 0
        else:
            there = blocks.stop == len(model.layers)
        if there:
            is_cut = kind_of(name) is not None or kind_of(name.rpartition(".")[0]) is not None
            found.append((parameter.numel() // (tensor if is_cut else 1), parameter.requires_grad))
    return found


def _activations(
    config: Config, sizes: FlagDiTConfig, stage: int, blocks: int, width: int, shards: int
) -> tuple[int, int]:
    """Bytes that wait for the backward pass, with one block's while it is computed; and of these those on the host.

    Of a token, a block without recomputation keeps about seven rows of the width of the model (what enters and leaves
    norms, attention and feed-forward), twice queries and keys, values, and three rows of the feed-forward's width.
    """
    parallel: ParallelConfig = config.parallel
    data = shards // (parallel.ring * parallel.ulysses)
    packs = config.train.packs_per_forward
    tokens = config.train.tokens_per_pack * packs / (parallel.ring * parallel.ulysses)
    between = tokens / (parallel.tensor if parallel.sequence else 1) * sizes.dim * width
    kv = sizes.kv_heads * sizes.head_dim
    shared = tokens * (3 * sizes.dim + 3 * kv + 3 * sizes.ffn_dim) / parallel.tensor * width
    whole_block = 7 * between + shared
    kept = {
        "none": whole_block,
        "selective": between + tokens * sizes.dim / parallel.tensor * width,
        "full": between,
    }[parallel.recompute]
    steps = max(1, config.train.global_batch_packs // (data * packs))
    under_way = min(steps, parallel.pipeline - stage)  # 1F1B: the first stage is ahead of the last
    waiting = blocks * kept * under_way
    working = 0 if parallel.recompute == "none" else whole_block
    on_host = waiting if parallel.offload_activations else 0
    return int(waiting + working), int(on_host)
