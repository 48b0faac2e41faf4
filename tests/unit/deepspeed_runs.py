"""DeepSpeed's own checkpoints of a tiny Flag-DiT under every ZeRO stage, with what DeepSpeed says is in them."""

import os
from itertools import product
from pathlib import Path

import torch

from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from tests.parallel.workers import free_port, run_ranks

SIZES = FlagDiTConfig(dim=12, n_layers=2, n_heads=2, multiple_of=4, in_channels=1, cap_feat_dim=6)
STAGES, DTYPES, WORLDS = (0, 1, 2, 3), ("fp32", "bf16"), (1, 2)
STEPS = 2
with torch.device("meta"):
    SHAPES = {name: tuple(parameter.shape) for name, parameter in FlagDiT(SIZES).named_parameters()}


def write_all(folder: Path) -> None:
    """A folder `{stage}_{dtype}_{world}` for each, with `expected.pt` beside DeepSpeed's own."""
    run_ranks(2, _write, str(folder), free_port())


def _write(rank: int, folder: str, port: int) -> None:
    from lumina.parallel import engine as ours  # imports DeepSpeed, quietly

    deepspeed = ours.deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for world in sorted(WORLDS, reverse=True):
        if rank >= world:
            return
        if world == 1:
            os.environ.update(WORLD_SIZE="1", MASTER_PORT=str(port))
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        for stage, dtype in product(STAGES, DTYPES):
            _save(deepspeed, Path(folder) / f"{stage}_{dtype}_{world}", stage, dtype == "bf16", rank)
        torch.distributed.barrier()
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def _save(deepspeed, folder: Path, stage: int, bf16: bool, rank: int) -> None:
    torch.manual_seed(0)
    model = FlagDiT(SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0 if stage else 0.0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    if stage:  # an optimizer of its own kind, BF16_Optimizer, under ZeRO 1
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 3:  # several flat tensors a group
        settings["zero_optimization"]["sub_group_size"] = 1000
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    dtype = torch.bfloat16 if bf16 else torch.float32
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        x, captions = torch.randn(2, 1, 4, 4, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
        out = engine(x, torch.rand(2), captions, torch.ones(2, 3))
        engine.backward(out.float().square().mean())
        engine.step()
    expected = _expected(deepspeed, engine, stage, bf16)
    engine.save_checkpoint(str(folder))
    if rank == 0:
        torch.save(expected | {"zero_to_fp32": _zero_to_fp32(folder, stage, bf16)}, folder / "expected.pt")
    engine.destroy()


def _expected(deepspeed, engine, stage: int, bf16: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and moments, as the running engine tells them."""
    named = dict(engine.module.named_parameters())
    if stage:
        from lumina.parallel.fragments import Trained, fragments_of

        trained = [Trained(name, p, SHAPES[name], None) for name, p in named.items() if p.requires_grad]
        inner = engine.optimizer.optimizer
        kinds = {kind: {t.name: torch.zeros(t.shape) for t in trained} for kind in ("exp_avg", "exp_avg_sq")}
        for fragment in fragments_of(engine, trained):  # of this rank
            for kind, whole in kinds.items():
                fragment.place_in(whole[fragment.name], fragment.view_in(inner.state[fragment.flat][kind].view(-1)))
        for whole in [value for held in kinds.values() for value in held.values()]:
            torch.distributed.all_reduce(whole)
        read = deepspeed.utils.safe_get_full_fp32_param
        return {"master": {t.name: read(t.parameter).clone() for t in trained}} | kinds
    if bf16:
        masters = {
            id(low): high
            for lows, highs in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        adam = engine.optimizer.optimizer
    else:
        masters, adam = {id(p): p for p in named.values()}, engine.optimizer
    owner = {name: masters[id(p)] for name, p in named.items() if p.requires_grad}
    kinds = {kind: {n: adam.state[p][kind].clone() for n, p in owner.items()} for kind in ("exp_avg", "exp_avg_sq")}
    return {"master": {name: p.detach().clone() for name, p in owner.items()}} | kinds


def _zero_to_fp32(folder: Path, stage: int, bf16: bool) -> dict[str, torch.Tensor] | None:
    """What DeepSpeed's own script makes of the files; it refuses those without ZeRO, and those of BF16_Optimizer."""
    if stage == 0 or (stage == 1 and bf16):
        return None
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return {k: v.clone() for k, v in get_fp32_state_dict_from_zero_checkpoint(str(folder)).items()}
