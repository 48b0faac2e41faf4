"""Which layouts can run: every rule looked at before a process group is made."""

import math
from typing import TYPE_CHECKING

from lumina.config.schema import Config, ParallelConfig
from lumina.model.config import FlagDiTConfig

if TYPE_CHECKING:  # the planner asks these rules, and starts no process group
    from lumina.parallel.mesh import Mesh

_AXES = ("pipeline", "ring", "ulysses", "tensor")
_BESIDE = {
    "sequence": "sequence parallel",
    "offload_optimizer": "optimizer offloaded",
    "offload_activations": "activations offloaded",
}


def check_layout(config: Config, model: FlagDiTConfig, world_size: int) -> None:
    """
    Raises:
        ValueError: for a layout that cannot run: the number that does not fit, and the nearest that would.
    """
    parallel = config.parallel
    _check_tensor(parallel, model, world_size)
    if parallel.pipeline > model.n_layers:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} stages are more than the {model.n_layers} blocks of the model; "
            f"set it to at most {model.n_layers}"
        )
    heads = model.kv_heads // parallel.tensor
    if parallel.ulysses > heads:
        ranks = parallel.ulysses * parallel.ring
        fitting = max(size for size in range(1, heads + 1) if ranks % size == 0)
        raise ValueError(
            f"parallel.ulysses={parallel.ulysses} ranks cannot share {heads} key-value heads (model.n_kv_heads="
            f"{model.kv_heads} over parallel.tensor={parallel.tensor}); with as many ranks, set parallel.ulysses="
            f"{fitting} and parallel.ring={ranks // fitting}"
        )
    _check_zero(parallel, config.precision)
    _check_recompute(parallel)
    data_size = _data_size(parallel, world_size)
    accumulation_steps(config, data_size)


def describe(mesh: "Mesh") -> str:
    """The layout in a few words, as "8 (data 2 × ring 2 × tensor 2)"."""
    return _in_words({name: getattr(mesh, name).size for name in ("data", *_AXES)}, mesh.world.size)


def described(parallel: ParallelConfig, world_size: int) -> str:
    """What `describe` says of the mesh of a layout that can run; with what else of it is not as it is by itself."""
    sizes = {name: getattr(parallel, name) for name in _AXES}
    words = [_in_words({"data": world_size // math.prod(sizes.values())} | sizes, world_size)]
    words += [f"ZeRO {parallel.zero_stage}", *(said for name, said in _BESIDE.items() if getattr(parallel, name))]
    return ", ".join(words)


def _in_words(sizes: dict[str, int], world_size: int) -> str:
    product = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{world_size} ({product})" if product else str(world_size)


def _check_tensor(parallel: ParallelConfig, model: FlagDiTConfig, world_size: int) -> None:
    size = parallel.tensor
    if parallel.sequence and size == 1:
        raise ValueError(
            "parallel.sequence shards activations over tensor-parallel ranks; with parallel.tensor=1 set it to false"
        )
    counts = {
        f"model.n_heads={model.n_heads}": model.n_heads,
        f"model.n_kv_heads={model.kv_heads}": model.kv_heads,
        f"the feed-forward width {model.ffn_dim}": model.ffn_dim,
    }
    for what, count in counts.items():
        if count % size:
            all_counts = (*counts.values(), world_size)
            fitting = [d for d in range(1, model.kv_heads + 1) if not any(n % d for n in all_counts)]
            raise ValueError(
                f"parallel.tensor={size} does not divide {what}; the nearest that does is {_nearest(fitting, size)}"
            )


def _check_zero(parallel: ParallelConfig, precision: str) -> None:
    stage = parallel.zero_stage
    if parallel.pipeline > 1 and stage > 1:
        fitting = "1" if precision == "bf16" else "0 or 1"
        raise ValueError(
            f"parallel.zero_stage={stage} does not go with parallel.pipeline={parallel.pipeline}: gradients, and "
            "weights, would be cut up and put together again for every micro-batch; "
            f"set parallel.zero_stage to {fitting}"
        )
    if precision == "bf16" and stage == 0:
        raise ValueError(
            "precision=bf16 needs parallel.zero_stage 1, 2 or 3: DeepSpeed keeps fp32 master weights and fp32 "
            "gradient sums there alone; with one process stage 1 costs nothing over 0"
        )
    if parallel.offload_optimizer and stage == 0:
        raise ValueError("parallel.offload_optimizer=true needs parallel.zero_stage 1, 2 or 3; set it to 1")


def _check_recompute(parallel: ParallelConfig) -> None:
    if parallel.offload_activations and parallel.recompute != "full":
        raise ValueError(
            f"parallel.offload_activations=true moves what recomputation keeps of each block, and parallel.recompute="
            f"{parallel.recompute} keeps more than is worth moving; set parallel.recompute=full"
        )


def _data_size(parallel: ParallelConfig, world_size: int) -> int:
    sizes = {axis: getattr(parallel, axis) for axis in ("tensor", "pipeline", "ring", "ulysses")}
    replica = parallel.tensor * parallel.pipeline * parallel.ring * parallel.ulysses
    if world_size % replica:
        product = " × ".join(f"parallel.{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise ValueError(
            f"a world of {world_size} processes cannot be laid out as {product}, which takes a multiple of {replica}; "
            f"the nearest is {_nearest_multiple(replica, world_size)}"
        )
    return world_size // replica


def accumulation_steps(config: Config, data_size: int) -> int:
    """Forward passes of a rank in one optimizer step.

    Raises:
        ValueError: where the packs of a step cannot be shared out evenly.
    """
    packs, at_once = config.train.global_batch_packs, config.train.packs_per_forward
    if packs % data_size:
        at_a_time = data_size * at_once
        raise ValueError(
            f"train.global_batch_packs={packs} cannot be shared by {data_size} data-parallel ranks; "
            f"the nearest number that can is {_nearest_multiple(at_a_time, packs)}"
        )
    of_rank = packs // data_size
    if of_rank % at_once:
        fitting = [d for d in range(1, of_rank + 1) if of_rank % d == 0]
        raise ValueError(
            f"train.packs_per_forward={at_once} does not divide the {of_rank} packs that each rank has in a step; "
            f"the nearest number that does is {_nearest(fitting, at_once)}"
        )
    return of_rank // at_once


def _nearest(fitting: list[int], wanted: int) -> int:
    return min(fitting, key=lambda number: abs(number - wanted))


def _nearest_multiple(of: int, wanted: int) -> int:
    """The smaller of two that are equally near; at least one."""
    return max(1, -((of - 2 * wanted) // (2 * of))) * of
