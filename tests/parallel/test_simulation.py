"""What a simulated rank holds and sends, against real ranks over gloo and DeepSpeed's pipeline."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lumina.benchmark.live_bytes import LiveBytes
from lumina.benchmark.recorded_messages import recorded_messages
from lumina.benchmark.simulation import MicroBatches, Simulated
from lumina.config.schema import Config
from lumina.model import tokens
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import Captions
from lumina.parallel.layout import accumulation_steps
from lumina.parallel.mesh import Mesh, close_mesh, open_mesh
from lumina.planner.messages import Messages
from tests.parallel.simulations import CAPTIONS, LABEL, ONE, SHAPES, TEXT, TWO, config_of, simulated
from tests.parallel.workers import free_port, run_ranks

WORLD = 4
CASES = [
    (TEXT | ONE, {"tensor": 2}, "bf16"),
    (TEXT | TWO, {"tensor": 2, "sequence": True, "ring": 2}, "fp32"),
    (TEXT | ONE, {"ring": 4}, "fp32"),
    (TEXT | ONE, {"ulysses": 4, "recompute": "full"}, "fp32"),
    (LABEL | ONE, {"ring": 2, "ulysses": 2, "recompute": "selective"}, "bf16"),
    (TEXT | TWO, {"pipeline": 2, "tensor": 2, "sequence": True}, "fp32"),
]


def real_pack(config: Config, mesh: Mesh):
    """A pack of noise as training makes them."""
    from lumina.encoders.vae import build_vae
    from lumina.flow.loss import Objective
    from lumina.parallel.randomness import Randomness
    from lumina.train.prepare import Encoded, Identity, Preparer

    sizes = FlagDiTConfig.from_dict(config.model)
    generator = torch.Generator().manual_seed(0)
    captions = labels = None
    if sizes.text_conditional:
        features = torch.randn(sum(CAPTIONS), sizes.cap_feat_dim, generator=generator)
        captions = Captions.of(features, tuple(CAPTIONS))
    else:
        labels = torch.zeros(len(SHAPES), dtype=torch.long)
    latents = [torch.randn(shape, generator=generator) for shape in SHAPES]
    identities = tuple(Identity(number, 0, 0) for number in range(len(SHAPES)))
    preparer = Preparer(sizes, build_vae(config.vae, 4), None, Objective.build(), Randomness(0), 0.0, mesh)
    return preparer.pack(Encoded(identities, latents, captions, labels))


def both(rank: int, cases: list[tuple[dict, dict, str]], ports: list[int]) -> list[tuple]:
    """Of each case what this rank does over gloo on real tensors, and what the simulation says of it."""
    return [_both(rank, case, port) for case, port in zip(cases, ports, strict=True)]


def _both(rank: int, case: tuple[dict, dict, str], port: int) -> tuple[Simulated | Messages, Simulated]:
    model, layout, precision = case
    os.environ["MASTER_PORT"] = str(port)
    config = config_of(model, layout, precision)
    tokens._layout_of.cache_clear()  # a layout that was used keeps what its attention needs
    mesh = open_mesh(config.parallel)
    if mesh.pipeline.size > 1:
        real = sent_by_the_engine(config, mesh)
    else:
        with LiveBytes() as live:
            real = MicroBatches(config, FlagDiTConfig.from_dict(model), mesh, real_pack(config, mesh), live).run()
    close_mesh(mesh)
    return real, simulated(config, 4, rank)


def sent_by_the_engine(config: Config, mesh: Mesh) -> Messages:
    """What DeepSpeed's pipeline sends for the micro-batches of a step."""
    from lumina.parallel.engine import Engine

    steps = accumulation_steps(config, mesh.data.size)
    engine = Engine(FlagDiT(FlagDiTConfig.from_dict(config.model)), config, mesh, steps)
    packs = [real_pack(config, mesh) for _ in range(steps)]
    with recorded_messages(mesh) as messages:
        engine.accumulate(packs, lambda pack: pack.data, lambda _, output: output.square().sum())
    engine.close()
    return messages


@pytest.mark.slow
def test_real_ranks_hold_and_send_what_was_simulated():
    told = run_ranks(WORLD, both, CASES, [free_port() for _ in CASES])
    for rank, results in enumerate(told):
        for case, (real, fake) in zip(CASES, results, strict=True):
            assert fake.rank == rank
            assert fake.messages
            if isinstance(real, Counter):
                steps = accumulation_steps(config_of(*case), 1)
                assert steps > 1
                of_the_model = {message: count for message, count in real.items() if message.axis != "others"}
                assert of_the_model == {message: count * steps for message, count in fake.messages.items()}, (
                    rank,
                    case,
                )
                continue
            # gloo's threads let go of messages late, the later the busier the machine, and sum what they scatter in a
            # copy.
            late = range(sum(message.bytes for message in fake.messages) + 1)
            assert real.kept - fake.kept in late, (rank, case)
            assert real.peak - fake.peak in late, (rank, case)
            assert replace(real, kept=fake.kept, peak=fake.peak) == fake, (rank, case)
