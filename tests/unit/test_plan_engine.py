"""What is planned of a whole step beside a real one: the tensors that live in it, DeepSpeed's with them, and what
DeepSpeed sends.
"""

import gc
import os
from collections import Counter

import pytest

from lumina.benchmark.throughput import Point, configured, latent_shape
from lumina.model.tokens import token_count
from lumina.planner.memory import largest, plan_memory, stage_parameters
from lumina.planner.traffic import Load, gradient_messages
from tests.parallel.workers import free_port, run_ranks

TOKENS, CAPTION, PACKS = 64, 16, 2  # packs of a rank, in a step
SIZES = ("model.dim=256", "model.n_layers=6", "model.n_heads=4", "model.cap_feat_dim=64")
OFFLOAD = ",offload"  # of the optimizer
LAYOUTS = [  # of two ranks
    ("zero=0", "fp32"),
    ("zero=1", "fp32"),
    ("zero=1", "bf16"),
    ("zero=2", "fp32"),
    ("zero=2", "bf16"),
    ("zero=3", "fp32"),
    ("zero=3", "bf16"),
    ("tp=2,zero=1", "bf16"),
    ("zero=1,offload", "fp32"),
    ("zero=1,offload", "bf16"),
    ("zero=2,offload", "bf16"),
    ("zero=3,offload", "bf16"),
]


def point(layout, dtype):
    return Point(
        model="600m",
        tokens=TOKENS,
        layout=layout.removesuffix(OFFLOAD),
        samples=1,
        packs=PACKS,
        text_tokens=CAPTION,
        dtype=dtype,
        steps=1,
        warm_up=0,
        profile_steps=0,
        peak=None,
        overrides=(*SIZES, f"parallel.offload_optimizer={layout.endswith(OFFLOAD)}"),
    )


def most_alive(rank, world, layouts, ports):
    """Bytes of tensors of this rank at the fullest moment of a step, and what it sends of gradients in another, but
    messages of a few numbers.

    Of three steps after the second the least: gloo's threads let go of messages late, the later the busier the machine.
    """
    from lumina.benchmark.live_bytes import LiveBytes
    from lumina.benchmark.recorded_messages import recorded_messages
    from lumina.benchmark.throughput import Bench
    from lumina.parallel.mesh import close_mesh, open_mesh

    told = []
    for (layout, dtype), port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        asked = point(layout, dtype)
        with LiveBytes() as live:
            config, sizes = configured(asked, world)
            mesh = open_mesh(config.parallel)
            bench = Bench(asked, config, sizes, mesh)
            of_steps = []
            for _ in range(5):
                gc.collect()
                live.peak = live.live
                bench._step()
                of_steps.append(live.peak)
            with recorded_messages(mesh) as messages:
                bench._step()
            sums = Counter()
            for message, count in messages.items():
                if message.axis == "gradient" and message.bytes > 8:
                    sums[message.operation] += message.bytes * count
            told.append((min(of_steps[2:]), dict(sums)))
            bench.engine.close()
            close_mesh(mesh)
            del bench
    return told


@pytest.mark.slow
def test_a_step_holds_and_sends_what_was_planned():
    of_ranks = run_ranks(2, most_alive, 2, LAYOUTS, [free_port() for _ in LAYOUTS])
    for (layout, dtype), *told in zip(LAYOUTS, *of_ranks, strict=True):
        config, sizes = configured(point(layout, dtype), 2)
        frames, _, height, width = latent_shape(TOKENS, sizes)
        load = Load((token_count(frames, height, width, sizes.patch_size, True),), (CAPTION,))
        plan = largest(plan_memory(config, sizes, 2, load, on_cpu=True))
        planned = plan.on_device + plan.on_host  # here both are the same memory
        measured = max(peak for peak, _ in told)
        print(f"{layout} {dtype}: {planned / measured:.3f} of {measured / 2**20:.1f} MiB")
        assert planned == pytest.approx(measured, rel=0.06), layout

        parallel = config.parallel
        (stage,) = stage_parameters(sizes, parallel.tensor, 1)
        messages = gradient_messages(
            parallel, config.precision, stage.elements, stage.of_block, PACKS, shards=2 // parallel.tensor
        )
        sums = Counter()
        for message, count in messages.items():
            sums[message.operation] += message.bytes * count
        assert all(sent == dict(sums) for _, sent in told), layout
