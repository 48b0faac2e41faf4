"""Bytes that a rank sends for each token and layer, counted, against the formulas of docs/parallel.md."""

import os

import pytest
import torch

from tests.parallel.traffic import Traffic
from tests.parallel.workers import free_port, run_ranks

DIM, KV, TOKENS, FP32 = 64, 32, 240, 4
SIZES = {"dim": DIM, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "in_channels": 1, "num_classes": 3}


def tensor(n: int) -> float:
    """Two sums of all tokens forward and two backward, whether as all-reduces or in halves; and the KQ-norm's moments.

    These are two numbers of q and two of k, fp32 in any precision: gathered forward, summed backward.
    """
    moments = 4 * 4 * (n - 1) + 2 * 4 * 4 * (n - 1) / n
    return 8 * DIM * FP32 * (n - 1) / n + moments


def ring(n: int) -> float:
    """Keys and values go n-1 steps forward and n-1 backward; the fp32 sums of their gradients go n, to be at home."""
    return (2 * (n - 1) * 2 * KV * FP32 + n * 2 * KV * 4) / n


def ulysses(n: int) -> float:
    """q, k, v and the output, forward and backward; what is sent is not one's own."""
    return 2 * (2 * DIM + 2 * KV) * FP32 * (n - 1) / n / n


def ring_of_ulysses(ring_size: int, ulysses_size: int) -> float:
    """The ring moves the keys of 1/ulysses of the heads of a stretch that is ulysses times as long."""
    n = ring_size * ulysses_size
    exchanged = 2 * (2 * DIM + 2 * KV) * FP32 * (ulysses_size - 1) / ulysses_size / n
    return exchanged + ring(ring_size) / ulysses_size


CASES = {
    "tensor": ({"tensor": 4}, tensor),
    "tensor with sequence": ({"tensor": 4, "sequence": True}, tensor),
    "ring": ({"ring": 4}, ring),
    "ulysses": ({"ulysses": 4}, ulysses),
    "ring × ulysses": ({"ring": 2, "ulysses": 2}, lambda n: ring_of_ulysses(2, n // 2)),
}


def sent(rank: int, layouts: list[dict], ports: list[int]) -> list[list[dict[str, float]]]:
    """Of each layout, what this rank sends for a pack, forward and backward, with one layer and with two."""
    from lumina.config.schema import ParallelConfig
    from lumina.model.config import FlagDiTConfig
    from lumina.model.flag_dit import FlagDiT
    from lumina.model.tokens import layout_of
    from lumina.parallel.mesh import close_mesh, open_mesh
    from lumina.parallel.sequence import stretch_of
    from lumina.parallel.stage import Stage
    from lumina.parallel.tensor import parallelize_tensor

    class Pack:
        t, captions, labels = torch.tensor([0.5]), None, torch.tensor([1])

    results = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        mesh = open_mesh(ParallelConfig(**layout))
        counts = []
        for layers in (1, 2):
            model = FlagDiT(FlagDiTConfig(n_layers=layers, **SIZES))
            if mesh.tensor.size > 1:
                parallelize_tensor(model, mesh)
            stage = Stage(model, range(layers), mesh, recompute="none", offload=False)
            pack = Pack()
            pack.stretch = stretch_of(layout_of([(1, 1, 24, 40)], 2, False, "cpu"), mesh)
            with Traffic() as traffic:
                x = torch.randn(pack.stretch.stop - pack.stretch.start, 4)
                stage(x, pack).square().sum().backward()
            counts.append(dict(traffic.sent))
        close_mesh(mesh)
        results.append(counts)
    return results


def sent_by_stages(rank: int) -> tuple[float, int, int]:
    """Bytes sent, tokens and samples of one step of a pipeline of all ranks."""
    from lumina.checkpoint.load import model_config
    from lumina.config.load import validate
    from lumina.config.schema import VaeConfig
    from lumina.encoders.vae import build_vae
    from lumina.flow.loss import Objective
    from lumina.model.flag_dit import FlagDiT
    from lumina.parallel.engine import Engine
    from lumina.parallel.mesh import open_mesh
    from lumina.parallel.randomness import Randomness
    from lumina.train.prepare import Preparer
    from tests.parallel.parity import PACKS, Case, packs_of, tree_of

    config = validate(tree_of(Case(4, {"pipeline": 4}, kind="label")), "test")
    sizes = model_config(config)
    mesh = open_mesh(config.parallel)
    prepare = Preparer(sizes, build_vae(VaeConfig(), 1), None, Objective.build(), Randomness(0), 0.0, mesh)
    engine = Engine(FlagDiT(sizes), config, mesh, PACKS)
    packs = [prepare(pack) for pack in packs_of(1, "label")]
    with Traffic() as traffic:
        engine.accumulate(packs, lambda pack: pack.data, lambda _, output: output.square().sum())
    tokens = sum(len(pack.data) for pack in packs)
    return sum(traffic.sent.values()), tokens, sum(len(pack.t) for pack in packs)


@pytest.mark.slow
def test_bytes_between_stages():
    """x forward and its gradient backward for each token and boundary, and the same of c for each sample."""
    from deepspeed.runtime.pipe.engine import TENSOR_META_SIZE

    from tests.parallel.parity import MODEL, PACKS

    told = run_ranks(4, sent_by_stages)
    _, tokens, samples = told[0]
    shapes = PACKS * TENSOR_META_SIZE * 4  # which DeepSpeed sends before every activation
    of_boundary = sum(sent for sent, _, _ in told) / 3 - shapes
    print(f"pipeline: {of_boundary / tokens:.1f} bytes a token and boundary, {2 * MODEL['dim'] * FP32} of them x")
    assert of_boundary == 2 * MODEL["dim"] * FP32 * (tokens + samples)


@pytest.mark.slow
def test_bytes_for_each_token_and_layer():
    layouts = [layout for layout, _ in CASES.values()]
    told = run_ranks(4, sent, layouts, [free_port() for _ in layouts])
    for index, (name, (layout, formula)) in enumerate(CASES.items()):
        ranks = [sum(two.values()) - sum(one.values()) for one, two in (of_rank[index] for of_rank in told)]
        measured = (sum(ranks) / len(ranks) - _whatever_the_length(layout)) / TOKENS
        print(f"{name}: {measured:.1f} bytes a token and layer, {formula(4):.1f} by formula")
        assert measured == pytest.approx(formula(4), rel=1e-6), name


def _whatever_the_length(layout: dict) -> float:
    """Bytes for the sample's modulation, and the gradients that it and the norms of a block have."""
    if "tensor" not in layout:
        return 0.0
    n, modulation, width = layout["tensor"], 6 * DIM * FP32, DIM * FP32
    gathered = modulation * (n - 1) / n
    summed = width + (modulation + 2 * DIM * FP32 if layout.get("sequence") else 0)
    return gathered + 2 * summed * (n - 1) / n
