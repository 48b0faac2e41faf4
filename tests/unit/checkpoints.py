"""Ranks that are threads, to save and load checkpoints without launching anything."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import torch

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import step_folder
from lumina.checkpoint.save import Piece, Saver, SaveState
from lumina.parallel.mesh import Mesh, World
from tests.parallel.workers import PATIENCE


@dataclass(frozen=True, eq=False)
class ThreadMesh(Mesh):
    """The mesh of a rank that is a thread; `values` and `all_here` are of all ranks."""

    values: list = field(default_factory=list)
    all_here: Barrier = field(default_factory=lambda: Barrier(1))

    def _all(self, value):
        self.values[self.world.rank] = value
        self.all_here.wait(timeout=PATIENCE)
        values = list(self.values)
        self.all_here.wait(timeout=PATIENCE)
        return values

    def barrier(self):
        self._all(None)

    def gather(self, value):
        values = self._all(value)
        return values if self.is_first else None

    def any(self, flag):
        return any(self._all(flag))

    def from_first(self, value):
        return self._all(value)[0]


def on_ranks(world, work):
    """What `work(mesh)` returns on each of `world` ranks, in order."""
    values, all_here = [None] * world, Barrier(world)

    def on(rank):
        mesh = ThreadMesh(World(rank, world, rank), torch.device("cpu"), values=values, all_here=all_here)
        return work(mesh)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on, range(world)))


def state_of(step):
    return SaveState(step, step, data={}, model={"dim": 16})


def one_tensor():
    return [Piece("master", "w", (2, 3), 0, torch.arange(6.0))]


def save(run_dir, config, step=1, pieces=None, state=None):
    """By one rank."""
    return save_on_ranks(run_dir, config, [pieces or one_tensor()], step, state)


def save_on_ranks(run_dir, config, pieces, step=1, state=None):
    """`pieces`: those of each rank. Returns the checkpoint's folder."""
    state = state or state_of(step)

    def work(mesh):
        saver = Saver(run_dir, config, mesh)
        saver.start(state, pieces[mesh.world.rank])
        saver.finish()
        saver.close()

    on_ranks(len(pieces), work)
    return step_folder(run_dir, state.step)


def whole(folder):
    """Every tensor of a checkpoint, as kind/name."""
    checkpoint = Checkpoint(folder)
    return {
        f"{kind}/{name}": values
        for kind in checkpoint.manifest.tensors
        for name, values in checkpoint.state_dict(kind).items()
    }
