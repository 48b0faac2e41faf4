"""Short real training runs for tests: a tiny model on the digits, in this process or on several ranks."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.parallel.workers import free_port, run_ranks

TINY_MODEL = {"patch_size": 2, "in_channels": 1, "dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 16}


def tiny_config(run_dir: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    """A configuration tree; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 3},
        "model": TINY_MODEL | {"cap_feat_dim": 16},
        "text": {"encoder": "bytes", "width": 16, "max_tokens": 8},
        "data": {"shards": [str(shards)]},
        "train": {
            "steps": 4,
            "learning_rate": 1e-2,
            "global_batch_packs": 4,
            "tokens_per_pack": 100,
            "ema_decay": 0.9,
            # Against Adam's 1e-8, the rounding of a gradient as small as k_norm.bias's shows as steps of full size.
            "adam_epsilon": 1e-5,
        },
        "precision": "fp32",
        "checkpoint": {"every": 100},
        "log": {"tensorboard": False},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[section] = value
    return tree


def train_tree(rank: int, tree: dict[str, Any]) -> None:
    """Train to the end; a target for `run_ranks`."""
    from lumina.config.load import validate
    from lumina.train.loop import train

    train(validate(tree, "test"))


def train_trees(rank: int, trees: list[dict[str, Any]], ports: list[int]) -> None:
    """Train one after another in the same processes, whose start costs more than these runs do."""
    for tree, port in zip(trees, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a store of its own for each run
        train_tree(rank, tree)


def train_on(world: int, *trees: dict[str, Any]) -> None:
    """Train each of `trees` in turn on `world` ranks."""
    run_ranks(world, train_trees, list(trees), [free_port() for _ in trees])


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, whole, as kind/name."""
    from lumina.checkpoint.load import latest_checkpoint

    checkpoint = latest_checkpoint(run_dir)
    return {
        f"{kind}/{name}": value
        for kind in checkpoint.manifest.tensors
        for name, value in checkpoint.state_dict(kind).items()
    }
