"""Bytes that a rank sends for each token and layer, counted, against the formulas of docs/parallel.md."""

import os

import pytest
import torch

from tests.parallel.traffic import Traffic
from tests.parallel.workers import free_port, run_ranks

DIM, KV, TOKENS, FP32 = 64, 32, 240, 4
SIZES = {"dim": DIM, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "in_channels": 1, "num_classes": 3}


def tensor(n: int) -> float:
    """Two sums of the tokens forward and two backward; the moments of the KQ-norm, two of q and two of k."""
    moved = 4 * 2 * DIM * FP32 + (4 + 2 * 4) * 4 * n / 1
    return moved * (n - 1) / n if n == 1 else 8 * DIM * FP32 * (n - 1) / n + _moments(n)


def _moments(n: int) -> float:
    # Gathered forward (n pieces of 4 numbers), summed backward; fp32 in any precision.
    return 4 * 4 * (n - 1) + 2 * 4 * 4 * (n - 1) / n


def tensor_sequence(n: int) -> float:
    """Each sum is a reduce-scatter and a gather, of which the other half comes at the next region."""
    return tensor(n)


def ring(n: int) -> float:
    """Keys and values go n-1 steps forward and n-1 backward; the fp32 sums of their gradients go n, to be at home."""
    return (2 * (n - 1) * 2 * KV * FP32 + n * 2 * KV * 4) / n


def ulysses(n: int) -> float:
    """q, k, v and the output, forward and backward; what is sent is not one's own."""
    return 2 * (2 * DIM + 2 * KV) * FP32 * (n - 1) / n / n


CASES = {
    "tensor": ({"tensor": 4}, tensor),
    "tensor with sequence": ({"tensor": 4, "sequence": True}, tensor_sequence),
    "ring": ({"ring": 4}, ring),
    "ulysses": ({"ulysses": 4}, ulysses),
    "ring × ulysses": ({"ring": 2, "ulysses": 2}, lambda n: ring_of_ulysses(2, 2)),
}


def ring_of_ulysses(ring_size: int, ulysses_size: int) -> float:
    """The ring moves the keys of 1/ulysses of the heads of a stretch that is ulysses times as long."""
    n = ring_size * ulysses_size
    exchanged = 2 * (2 * DIM + 2 * KV) * FP32 * (ulysses_size - 1) / ulysses_size / n
    return exchanged + ring(ring_size) / ulysses_size


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
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
    return results


@pytest.mark.slow
def test_bytes_for_each_token_and_layer():
    layouts = [layout for layout, _ in CASES.values()]
    told = run_ranks(4, sent, layouts, [free_port() for _ in layouts])
    for index, (name, (layout, formula)) in enumerate(CASES.items()):
        ranks = [sum(two.values()) - sum(one.values()) for one, two in (of_rank[index] for of_rank in told)]
        # The modulation's gather and its gradient's sums are of samples, not of tokens.
        conditions = _of_conditions(layout)
        measured = (sum(ranks) / len(ranks) - conditions) / TOKENS
        print(f"{name}: {measured:.1f} bytes a token and layer, {formula(4):.1f} by formula")
        assert measured == pytest.approx(formula(4), rel=1e-6), name


def _of_conditions(layout: dict) -> float:
    if "tensor" not in layout:
        return 0.0
    n, modulation, width = layout["tensor"], 6 * DIM * FP32, DIM * FP32
    gathered = modulation * (n - 1) / n
    gradient = 2 * modulation * (n - 1) / n if layout.get("sequence") else 0
    return gathered + gradient + 2 * width * (n - 1) / n
