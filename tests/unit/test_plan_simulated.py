"""The plan's activations and messages against the real model on fake tensors: layouts, places, models, loads."""

import pytest

from lumina.benchmark.simulation import simulate
from lumina.config.load import with_overrides
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import token_count
from lumina.planner.memory import activations_under_way, place_of, stage_parameters
from lumina.planner.messages import total_bytes
from lumina.planner.traffic import Load, pass_messages

WIDE = {"dim": 768, "n_layers": 4, "n_heads": 12, "n_kv_heads": 4, "cap_feat_dim": 512}
SMALL = {"dim": 384, "n_layers": 5, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 256, "frames": True}
CLASSES = {"dim": 512, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "num_classes": 10, "qk_norm": False}
LONG, MIXED, VIDEO = [(1, 4, 128, 160)], [(1, 4, 96, 96), (1, 4, 40, 64), (1, 4, 2, 6)], [(3, 4, 48, 64)]
CAPTION = 17

# Model, samples, ranks, rank, layout; with packs of a replica, precision and kernels where they are not 2, bf16 and a
# GPU's.
CASES = [
    (WIDE, LONG, 1, 0, {}),
    (WIDE, LONG, 1, 0, {"recompute": "selective"}),
    (WIDE, MIXED, 1, 0, {"recompute": "full"}),
    (WIDE, MIXED, 1, 0, {"recompute": "full", "offload_activations": True}),
    (WIDE, MIXED, 2, 1, {"tensor": 2}),
    (WIDE, MIXED, 4, 3, {"tensor": 4, "sequence": True}),
    (WIDE, MIXED, 4, 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (WIDE, LONG, 4, 2, {"ring": 4}),
    (WIDE, MIXED, 8, 7, {"ring": 8, "recompute": "full"}),
    (WIDE, MIXED, 4, 1, {"ring": 4, "recompute": "selective"}),
    (WIDE, LONG, 4, 3, {"ulysses": 4}),
    (WIDE, MIXED, 3, 1, {"ulysses": 3, "recompute": "selective"}),
    (WIDE, LONG, 8, 5, {"ring": 4, "ulysses": 2, "recompute": "full"}),
    (WIDE, LONG, 2, 0, {"pipeline": 2}),
    (WIDE, LONG, 4, 3, {"pipeline": 2, "ring": 2, "recompute": "selective"}),
    (
        WIDE,
        LONG,
        512,
        299,
        {"tensor": 2, "sequence": True, "ring": 8, "ulysses": 2, "pipeline": 4, "recompute": "full"},
    ),
    (SMALL, VIDEO, 1, 0, {}, 1, "fp32"),
    (SMALL, VIDEO, 2, 1, {"tensor": 2, "sequence": True}, 1, "fp32"),
    (SMALL, VIDEO, 4, 1, {"ulysses": 2, "ring": 2}, 1, "fp32"),
    (SMALL, VIDEO, 3, 1, {"pipeline": 3, "recompute": "full"}, 4, "fp32"),
    (SMALL, VIDEO, 8, 7, {"pipeline": 2, "tensor": 2, "ulysses": 2}, 3, "bf16"),
    (CLASSES, LONG, 1, 0, {}),
    (CLASSES, MIXED, 2, 1, {"tensor": 2, "sequence": True, "recompute": "selective"}),
    (CLASSES, LONG, 2, 1, {"ulysses": 2}),
    (CLASSES, LONG, 4096, 4095, {"ring": 32, "tensor": 2, "recompute": "full"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]['dim']}-{case[2]}-{'-'.join(case[4])}")
def test_a_plan_is_its_simulation(case):
    model, shapes, world, rank, layout, *rest = case
    packs, precision = rest or (2, "bf16")
    data = world
    for axis in ("tensor", "pipeline", "ring", "ulysses"):
        data //= layout.get(axis, 1)
    tree = {
        "run": {"dir": "none"},
        "model": model | {"in_channels": 4},
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "ema_decay": 0.9, "global_batch_packs": packs * data},
        "precision": precision,
        "parallel": {"zero_stage": 1} | layout,
    }
    config = with_overrides(tree, [], "test")
    sizes = FlagDiTConfig.from_dict(config.model)
    captions = (CAPTION,) * len(shapes) if sizes.text_conditional else ()
    found = simulate(config, sizes, world, rank, shapes, captions)

    lengths = tuple(token_count(f, h, w, sizes.patch_size, sizes.text_conditional) for f, _, h, w in shapes)
    load, place = Load(lengths, captions), place_of(config.parallel, sizes, world, rank)
    assert place.held(load, config.parallel) == found.tokens
    assert pass_messages(sizes, config.parallel, precision, load, place) == found.messages
    assert (total_bytes(found.messages) > 0) == (world > data)
    planned = activations_under_way(config, sizes, world, load, place).on_device
    weights = stage_parameters(sizes, config.parallel.tensor, config.parallel.pipeline)[place.pipeline].elements
    print(f"{planned / found.peak:.4f} of {found.peak / 2**20:.1f} MiB, beside {weights} weights")
    assert planned == pytest.approx(found.peak, rel=0.05)
