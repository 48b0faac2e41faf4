"""What each rank of a run holds in memory, counted before anything is allocated.

Weights, masters, moments and EMA are exact to the byte, with DeepSpeed's padding. Gradients, buffers and activations
are those of the fullest moment of a step: as the backward pass starts, as gradients are reduced, or as weights are
updated. Activations are counted tensor by tensor (`planner.activations`). Not counted: text encoder, autoencoder,
CUDA's context and NCCL (one or two GiB without the encoders), fragmentation.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from lumina.config.deepspeed import REDUCE_BUCKET
from lumina.config.schema import Config, ParallelConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.lora import adapted_layers
from lumina.parallel.cuts import ON_FIRST_STAGE, cut, kind_of, stage_costs
from lumina.planner.activations import activations
from lumina.planner.traffic import ALL_REDUCED, FETCHED, FP32, GATHERED, WIDTH, Load, Place, fullest_place

_ALIGNMENT = 2  # elements, of a flat partition of ZeRO 1 and 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank.

    weights: what forward and backward passes use, in the run's precision.
    gradients: of the backward pass, and their sums.
    masters: fp32; 0 where the weights are their own.
    moments: Adam's two, fp32.
    ema: the averaged weights, fp32.
    buffers: for reducing gradients, gathering weights and updating them.
    activations: of the passes under way; 0 where another moment is the fullest.
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


@dataclass(frozen=True)
class StageParameters:
    """Parameters of a rank on one pipeline stage, before ZeRO shards them.

    trained, fixed: of so many elements, how many there are: pairs.
    of_block: elements of one block that ZeRO 3 gathers.
    gathered: that it gathers in all.
    """

    blocks: range
    trained: tuple[tuple[int, int], ...]
    fixed: tuple[tuple[int, int], ...]
    of_block: int
    gathered: int

    @cached_property
    def elements(self) -> int:
        """That are trained."""
        return sum(numel * count for numel, count in self.trained)


@lru_cache(maxsize=256)
def stage_parameters(sizes: FlagDiTConfig, tensor: int, pipeline: int) -> tuple[StageParameters, ...]:
    """Of each stage; all tensor-parallel ranks of one have as many."""
    costs, in_block, on_first, on_last = _parameters(sizes, tensor)
    found = []
    for blocks in cut(costs, pipeline):
        here: Counter[tuple[int, bool]] = Counter({kind: count * len(blocks) for kind, count in in_block.items()})
        here += on_first if blocks.start == 0 else Counter()
        here += on_last if blocks.stop == sizes.n_layers else Counter()
        trained, fixed = (
            tuple((numel, count) for (numel, trains), count in here.items() if trains is wanted)
            for wanted in (True, False)
        )
        of_block = sum(numel * count for (numel, trains), count in in_block.items() if trains)
        found.append(StageParameters(blocks, trained, fixed, of_block, sum(numel * count for numel, count in trained)))
    return tuple(found)


def trained_elements(config: Config, sizes: FlagDiTConfig) -> int:
    """Of all ranks together: of a run with `lora` those of its adapters."""
    if config.lora is None:
        return stage_parameters(sizes, 1, 1)[0].elements
    return _stages(config, sizes)[0].elements


def _stages(config: Config, sizes: FlagDiTConfig) -> tuple[StageParameters, ...]:
    lora, parallel = config.lora, config.parallel
    if lora is None:
        return stage_parameters(sizes, parallel.tensor, parallel.pipeline)
    targets = lora.target_modules
    return (_with_adapters(sizes, lora.rank, tuple(targets) if isinstance(targets, list) else targets),)


@lru_cache(maxsize=16)
def _with_adapters(sizes: FlagDiTConfig, rank: int, targets: tuple[str, ...] | str | None) -> StageParameters:
    """Of a run with `lora`, which has no more than one stage; weights that start anew are counted as frozen."""
    model = _meta_model(sizes)
    layers = [model.get_submodule(name) for name in adapted_layers(model, targets)]
    trained = Counter(rank * side for layer in layers for side in (layer.in_features, layer.out_features))
    fixed = Counter(parameter.numel() for parameter in model.parameters())
    elements = sum((trained + fixed)[numel] * numel for numel in trained + fixed)
    blocks = range(sizes.n_layers)
    of_block = sum(parameter.numel() for parameter in model.layers[0].parameters())
    return StageParameters(blocks, tuple(trained.items()), tuple(fixed.items()), of_block, elements)


@lru_cache(maxsize=64)
def _parameters(sizes: FlagDiTConfig, tensor: int) -> tuple[list[float], Counter, Counter, Counter]:
    """Costs of the blocks; and, of a block, the first and the last stage, parameters by (elements, whether trained)."""
    model = _meta_model(sizes)
    in_block: Counter[tuple[int, bool]] = Counter()
    on_first, on_last = Counter(), Counter()
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".")
        if head == "layers" and not rest.startswith("0."):
            continue
        place = in_block if head == "layers" else on_first if head in ON_FIRST_STAGE else on_last
        is_cut = kind_of(name) is not None or kind_of(name.rpartition(".")[0]) is not None
        place[parameter.numel() // (tensor if is_cut else 1), parameter.requires_grad] += 1
    return stage_costs(model), in_block, on_first, on_last


_meta_model = lru_cache(maxsize=16)(meta_model)


def load_of(config: Config, sizes: FlagDiTConfig) -> Load:
    """A forward pass of a run, taken as one long sample a pack: what attention and memory have most of."""
    count = config.train.packs_per_forward
    captions = (config.text.max_tokens if config.text else 128,) * count if sizes.text_conditional else ()
    return Load((config.train.tokens_per_pack,) * count, captions)


def plan_memory(
    config: Config, sizes: FlagDiTConfig, world: int, load: Load | None = None, *, on_cpu: bool = False
) -> list[MemoryPlan]:
    """Of a rank of each pipeline stage; the ranks of a stage hold the same, but for padding that is counted for all.

    Args:
        world: ranks; the layout is one that `parallel.layout.check_layout` has let pass.
        load: of a forward pass; unless given, `load_of` the configuration.
        on_cpu: whether ranks compute on CPUs, where the update is in one pass and takes nothing beside.
    """
    load = load_of(config, sizes) if load is None else load
    stages = _stages(config, sizes)
    whole = _everything(sizes)
    return [_of_stage(config, sizes, number, stage, world, load, whole, on_cpu) for number, stage in enumerate(stages)]


def fullest_stage(config: Config, sizes: FlagDiTConfig, world: int, load: Load, *, on_cpu: bool = False) -> MemoryPlan:
    """What `largest` finds among all stages: of those that hold the same, the first has most passes under way."""
    stages = _stages(config, sizes)
    firsts: dict[object, int] = {}
    for number, stage in enumerate(stages):
        firsts.setdefault((stage.trained, stage.fixed), number)
    whole = _everything(sizes)
    return largest(
        [_of_stage(config, sizes, number, stages[number], world, load, whole, on_cpu) for number in firsts.values()]
    )


def _everything(sizes: FlagDiTConfig) -> int:
    (one,) = stage_parameters(sizes, 1, 1)
    return sum(numel * count for numel, count in (*one.trained, *one.fixed))


def largest(plans: list[MemoryPlan]) -> MemoryPlan:
    """The one that takes most of a device."""
    return max(plans, key=lambda plan: plan.on_device)


def _of_stage(
    config: Config,
    sizes: FlagDiTConfig,
    number: int,
    stage: StageParameters,
    world: int,
    load: Load,
    whole: int,
    on_cpu: bool,
) -> MemoryPlan:
    parallel, width = config.parallel, WIDTH[config.precision]
    shards = world // (parallel.tensor * parallel.pipeline)  # data × ring × ulysses
    total, fixed = stage.elements, sum(numel * count for numel, count in stage.fixed)
    zero = parallel.zero_stage
    if zero == 0:
        held = share = total
    elif zero == 3:
        held = share = _sharded(stage.trained, shards)
    else:
        unit = _ALIGNMENT * shards
        held = -(-total // unit) * unit
        share = held // shards
    masters = 0 if zero == 0 else FP32 * share
    moments = 2 * FP32 * share
    ema = FP32 * min(share, total)  # without the padding, all of which is the last rank's
    under_way = activations_under_way(config, sizes, world, load, fullest_place(parallel, stage.blocks, number))
    again = _passes(config, world) > 1
    moments_of_step = _moments(config, stage, share, under_way.bytes, again=again, on_cpu=on_cpu)
    fullest = max(moments_of_step, key=lambda moment: moment.bytes)
    on_host = under_way.on_host if fullest.activations else 0
    gradients = fullest.gradients
    buffers = fullest.buffers
    if parallel.offload_optimizer:
        # The gradients of the update and, where they are not kept on the device, those of passes before; new weights.
        waiting = FP32 * share * (1 + int(zero == 3 or (again and width == FP32)))
        published = 0 if zero == 3 else width * share
        gradients, buffers = gradients + waiting, buffers + published
        on_host += masters + moments + ema + waiting + published
    return MemoryPlan(
        stage=number,
        parameters=total + fixed,
        weights=(held + (_sharded(stage.fixed, shards) if zero == 3 else fixed)) * width,
        gradients=gradients,
        masters=masters,
        moments=moments,
        ema=ema,
        buffers=buffers,
        activations=fullest.activations,
        on_host=on_host,
        loading=FP32 * whole,
    )


@dataclass(frozen=True)
class _Moment:
    """Bytes at one moment of a step, beside weights and the optimizer's state."""

    gradients: int
    buffers: int
    activations: int

    @property
    def bytes(self) -> int:
        return self.gradients + self.buffers + self.activations


def _moments(
    config: Config, stage: StageParameters, share: int, activations: int, *, again: bool, on_cpu: bool
) -> list[_Moment]:
    """The last backward pass as it starts, the reduction of gradients at its end, and the update.

    As DeepSpeed 0.19 does it, counted tensor by tensor in real runs (tests/unit/test_plan_engine.py).

    Args:
        share: trained elements that ZeRO leaves this rank to update.
        again: whether gradients of passes before are there already.
    """
    total = stage.elements
    zero, width, bucket = config.parallel.zero_stage, WIDTH[config.precision], min(REDUCE_BUCKET, total)
    whole, part, before = FP32 * total, FP32 * share, int(again)
    on_host, mixed = config.parallel.offload_optimizer, width != FP32
    if zero == 0:
        flat = FP32 * min(ALL_REDUCED, total)
        # On a GPU the update takes one value more of each parameter, for all at once.
        beside = 0 if on_cpu else whole
        return [_Moment(before * whole, 0, activations), _Moment(whole, flat, 0), _Moment(whole, beside, 0)]
    # The update works on one flat tensor; torch's AdamW of many passes takes two values more of each.
    update = 0 if on_host else part if on_cpu else 3 * part
    if zero == 1 and mixed and not on_host:
        # Gradients are summed in fp32 beside those of the pass, which stay until the next one.
        return [
            _Moment(before * whole, 0, activations),
            _Moment(whole, FP32 * bucket, 0),
            _Moment(whole + width * total, max(0, update - part), 0),
        ]
    # Where sums of gradients are kept in fp32 though weights are not, they stay on the device.
    sums = part if mixed or not on_host else 0
    if zero == 1:
        kept = sums if on_host else before * whole
        reduced = _Moment(whole + on_host * sums, FP32 * bucket, 0)
        return [_Moment(kept, FP32 * bucket, activations), reduced, _Moment(0, update, 0)]
    if zero == 2:
        started = _Moment(before * sums, width * bucket, activations)
        flat = width * bucket + mixed * FP32 * bucket  # what is reduced, and its copy in fp32
        return [started, _Moment(sums + width * bucket, flat, 0), _Moment(0, update, 0)]
    sums = 0 if on_host else part
    gathered = width * min(GATHERED, stage.gathered)
    fetched = width * min(stage.gathered, max(FETCHED, stage.of_block))  # as it arrives, before it is taken apart
    buffer = FP32 * bucket
    # One bucket holds all: then no weight is gathered any more. gloo takes a copy of all that it reduces and scatters.
    left = 0 if bucket == total else gathered
    reduced = FP32 * (bucket + (bucket if on_cpu else min(bucket, share)))
    return [
        _Moment(sums, buffer + gathered + fetched, activations),
        _Moment(sums, buffer + left + reduced, 0),
        _Moment(sums, buffer + update, 0),
    ]


def _passes(config: Config, world: int) -> int:
    """Of a rank, in a step."""
    parallel = config.parallel
    data = world // (parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses)
    return max(1, config.train.global_batch_packs // (data * config.train.packs_per_forward))


@dataclass(frozen=True)
class UnderWay:
    """Bytes of activations at a rank's fullest moment, and of these what waits on the host."""

    bytes: int
    on_host: int

    @property
    def on_device(self) -> int:
        return self.bytes - self.on_host


def activations_under_way(config: Config, sizes: FlagDiTConfig, world: int, load: Load, place: Place) -> UnderWay:
    """Of as many passes as are ahead of their backward passes: 1F1B, in which the first stage is ahead of the last."""
    parallel = config.parallel
    count = min(_passes(config, world), parallel.pipeline - place.pipeline)
    one = activations(sizes, parallel, config.precision, load, place)
    waiting = one.in_blocks * count if parallel.offload_activations else 0
    return UnderWay(one.kept * count + one.working, waiting)


def place_of(parallel: ParallelConfig, sizes: FlagDiTConfig, world: int, rank: int) -> Place:
    """Of a world rank, in the order of `parallel.mesh`."""
    stage, inner = divmod(rank, world // parallel.pipeline)
    tensor = inner % parallel.tensor
    ulysses = inner // parallel.tensor % parallel.ulysses
    ring = inner // (parallel.tensor * parallel.ulysses) % parallel.ring
    blocks = stage_parameters(sizes, parallel.tensor, parallel.pipeline)[stage].blocks
    return Place(blocks, stage, ring, ulysses, tensor)


def _sharded(counts: tuple[tuple[int, int], ...], shards: int) -> int:
    """Elements of one of `shards` equal shares of each, padded."""
    return sum(-(-numel // shards) * count for numel, count in counts)
