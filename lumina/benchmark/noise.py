"""What benchmarks share: a run that reads and writes nothing, and its mesh."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lumina.config.schema import ParallelConfig
from lumina.parallel.mesh import Mesh, close_mesh, open_mesh


def settings(model: str, conditions: dict[str, int], precision: str) -> dict[str, Any]:
    """The tree of a configuration whose data are noise; `conditions` are `cap_feat_dim` or `num_classes`."""
    return {
        "run": {"dir": "none"},
        "model": {"preset": model, "in_channels": 4} | conditions,
        "vae": {"model": "none"},
        "data": {"shards": ["none"]},
        "train": {"steps": 1, "ema_decay": 0.9999},
        "precision": precision,
    }


@contextmanager
def mesh_of(parallel: ParallelConfig) -> Iterator[Mesh]:
    """The mesh, which is closed afterwards."""
    mesh = open_mesh(parallel)
    try:
        yield mesh
    finally:
        close_mesh(mesh)
