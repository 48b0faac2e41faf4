"""The packs that a run would train on, for a plain loop beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumina.checkpoint.load import model_config
from lumina.config.load import validate
from lumina.flow.loss import Objective
from lumina.model.flag_dit import FlagDiT

if TYPE_CHECKING:
    from lumina.train.loop import Trainer


@contextmanager
def opened(tree: dict[str, Any]) -> "Iterator[Trainer]":
    """The trainer of a run, before its first step; nothing is trained or written."""
    from lumina.parallel.mesh import close_mesh, open_mesh
    from lumina.train.loop import Trainer
    from lumina.train.stop import StopSignals

    config = validate(tree, "test")
    mesh = open_mesh(config.parallel)
    trainer = Trainer(config, model_config(config), mesh, StopSignals())
    try:
        yield trainer
    finally:
        trainer.saver.close()
        trainer.engine.close()
        close_mesh(mesh)


def batches(tree: dict[str, Any], count: int) -> tuple[list, Objective, dict[str, Tensor]]:
    """Of its first steps; the objective; and what the run starts to train, by name."""
    with opened(tree) as trainer:
        drawn = {f.name: f.master.clone().view(f.shape) for f in trainer.engine.fragments}
        steps = iter(trainer.feed)
        data = [next(steps) for _ in range(count)]
        steps.close()
        return data, trainer.parts.objective, drawn


def loss_of(model: FlagDiT, objective: Objective, batch: Any) -> Tensor:
    """The mean over the samples of a global batch, by one pass a pack."""
    loss = torch.zeros(())
    for pack in batch.packs:
        noised = objective.corrupt(pack.data, pack.noise, pack.t_of_token)
        out = model.forward_packed(noised, pack.t, pack.stretch.tokens, pack.captions)
        errors = objective.squared_error(out, pack.data, pack.noise, pack.t_of_token)
        loss = loss + pack.per_sample(errors).sum() / batch.global_samples
    return loss
