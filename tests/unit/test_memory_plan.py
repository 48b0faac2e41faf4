"""The memory that is counted beforehand is the memory that the engine then has, byte for byte."""

import math
import os

import pytest

from lumina.checkpoint.load import model_config
from lumina.config.load import validate
from lumina.model.flag_dit import FlagDiT
from lumina.planner.memory import activations_under_way, load_of, plan_memory
from lumina.planner.traffic import Place
from tests.parallel.runs import tiny_config
from tests.parallel.workers import free_port, run_ranks

LAYOUTS = [
    {"parallel__zero_stage": 0},
    {"parallel__zero_stage": 1, "precision": "bf16"},
    {"parallel__zero_stage": 2},
    {"parallel__zero_stage": 3, "precision": "bf16"},
    {"parallel__tensor": 2, "parallel__zero_stage": 1},
    {"parallel__pipeline": 2, "parallel__zero_stage": 1},
    {"parallel__zero_stage": 1, "parallel__offload_optimizer": True},
    {"parallel__zero_stage": 0, "lora__rank": 3, "train__init_from": "unread"},
    {"parallel__zero_stage": 2, "precision": "bf16", "lora__rank": 3, "train__init_from": "unread"},
    {"parallel__zero_stage": 3, "lora__rank": 2, "lora__target_modules": ["wq"], "train__init_from": "unread"},
]


def config_of(folder, shards="data", **changes):
    return validate(tiny_config(folder, shards, **changes), "test")


def held(rank, folder, layouts, ports):
    """Bytes of weights, masters, moments and EMA that this rank has under each layout, and the elements it trains."""
    from lumina.parallel.engine import Engine
    from lumina.parallel.mesh import close_mesh, open_mesh
    from lumina.train.ema import EMA
    from lumina.train.lora import Lora

    found = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = config_of(folder, **layout)
        mesh = open_mesh(config.parallel)
        model = FlagDiT(model_config(config))
        if config.lora:
            Lora(config, model, anew=())
        engine = Engine(model, config, mesh, 1)
        zero = config.parallel.zero_stage
        weights = sum((p.ds_tensor if zero == 3 else p).nbytes for p in engine._stage.parameters())
        flats = {id(f.flat): f.flat for f in engine.fragments}.values()
        moments = sum(t.nbytes for flat in flats for t in engine._optimizer.state_of(flat).values() if t.dim())
        masters = 0 if zero == 0 else sum(flat.nbytes for flat in flats)
        ema = sum(values.nbytes for values in EMA(engine.fragments, 0.9).values)
        found.append((weights, masters, moments, ema))
        engine.close(keep_groups=False)
        close_mesh(mesh)
    return found


@pytest.mark.slow
def test_the_engine_has_what_was_planned(tmp_path):
    of_ranks = run_ranks(2, held, tmp_path, LAYOUTS, [free_port() for _ in LAYOUTS])
    for number, layout in enumerate(LAYOUTS):
        config = config_of(tmp_path, **layout)
        plans = plan_memory(config, model_config(config), 2)
        for rank in range(2):
            plan = plans[rank if len(plans) == 2 else 0]
            weights, masters, moments, ema = of_ranks[rank][number]
            # ZeRO 1 and 2 pad the end of all weights: at most three elements here, which parameters do not show.
            padding = (plan.weights - weights) // (2 if config.precision == "bf16" else 4)
            assert 0 <= padding <= (3 if config.parallel.zero_stage in (1, 2) else 0), layout
            assert (plan.masters, plan.moments) == (masters, moments), layout
            # All of the padding is the last rank's, whose average leaves it out.
            last = rank == 1 and len(plans) == 1 and config.parallel.tensor == 1
            assert plan.ema - ema == (4 * padding if last else 0), layout


@pytest.mark.parametrize("world", [1, 8])
def test_a_shard_is_a_share(tmp_path, world):
    """By hand, for ZeRO 1 and 3 in bf16."""
    for stage in (1, 3):
        config = config_of(tmp_path, train__global_batch_packs=8, precision="bf16", parallel__zero_stage=stage)
        sizes = model_config(config)
        model = FlagDiT(sizes)
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        everything = sum(p.numel() for p in model.parameters())
        frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
        (plan,) = plan_memory(config, sizes, world)
        if stage == 1:
            share = math.ceil(sum(trained) / (2 * world)) * 2
            assert plan.weights == 2 * (share * world + sum(frozen))
        else:
            share = sum(math.ceil(count / world) for count in trained)
            assert plan.weights == 2 * (share + sum(math.ceil(count / world) for count in frozen))
            assert plan.gradients == 4 * share
        assert (plan.masters, plan.moments) == (4 * share, 8 * share)
        assert plan.ema == 4 * min(share, sum(trained))
        assert (plan.parameters, plan.loading) == (everything, 4 * everything)


def test_offload_moves_and_does_not_add(tmp_path):
    kept = config_of(tmp_path, parallel__zero_stage=1)
    moved = config_of(tmp_path, parallel__zero_stage=1, parallel__offload_optimizer=True)
    (here,), (there,) = (plan_memory(config, model_config(config), 4) for config in (kept, moved))
    assert here.masters + here.moments + here.ema == there.masters + there.moments + there.ema
    assert here.on_host == 0
    # Beside the optimizer's state there are gradients and, until they are on the device, new weights.
    assert there.on_host == there.masters * 3 + there.moments + there.ema
    assert here.on_device - there.on_device >= there.masters + there.moments + there.ema


def test_recomputation_and_sharing_take_less(tmp_path):
    def activations(**changes):
        config = config_of(tmp_path, train__tokens_per_pack=4096, **changes)
        sizes = model_config(config)
        return activations_under_way(config, sizes, 4, load_of(config, sizes), Place(range(sizes.n_layers))).bytes

    whole = activations()
    assert whole > activations(parallel__recompute="selective") > activations(parallel__recompute="full")
    assert activations(parallel__ulysses=2) < 0.6 * whole
    assert whole > activations(parallel__tensor=2) > activations(parallel__tensor=2, parallel__sequence=True)
    assert activations(parallel__tensor=2, parallel__sequence=True) < 0.6 * whole
    assert activations(train__packs_per_forward=1) == whole
