"""Which process is which: what each launcher says of one, and its place on the axes."""

import os

import pytest
import torch

from lumina.parallel.mesh import _LAUNCHERS, _LOCAL_SIZES, World, device_of
from tests.parallel.workers import free_port, run_ranks

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*ADDRESS, *_LOCAL_SIZES, "SLURM_STEP_NUM_NODES", *(n for launcher in _LAUNCHERS for n in launcher)):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_ranks_from_the_environment(monkeypatch, names):
    for name, value in zip(names, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not set"):
        World.from_environment()
    for name, value in ADDRESS.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(rank=5, size=8, local_rank=1)


def test_one_process_without_a_launcher(monkeypatch):
    assert World.from_environment() == World(0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "0")  # in an allocation, but not under srun
    assert World.from_environment() == World(0, 1, 0)


@pytest.mark.parametrize(
    ("more", "local_size"),
    [
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, 8),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, None),
    ],
)
def test_ranks_of_the_host(monkeypatch, more, local_size):
    for name, value in (ADDRESS | more).items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(2, 8, 0, local_size)


def test_the_device_of_a_rank(monkeypatch):
    """A launcher that shows each rank its own GPU alone numbers the ranks nevertheless."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of(World(7, 8, 3)) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of(World(7, 8, 3)) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match=r"rank 4 is number 4 on .*, but that has 4 GPUs, .* at most 4 ranks on this"):
        device_of(World(4, 8, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(World(7, 8, 3)) == torch.device("cpu")


LAYOUTS = [
    {"ulysses": 4, "ring": 2},
    {"tensor": 4, "pipeline": 2},
    {"pipeline": 2, "ring": 2},
]
INNERMOST_FIRST = ("tensor", "ulysses", "ring", "data", "pipeline")


@pytest.mark.slow
def test_ranks_are_numbered_as_documented():
    """With tensor innermost and pipeline outermost, along every axis, on eight ranks."""
    for rank, layouts in enumerate(run_ranks(8, places, LAYOUTS, [free_port() for _ in LAYOUTS])):
        for layout, (axes, leads) in zip(LAYOUTS, layouts, strict=True):
            sizes = {axis: layout.get(axis, 1) for axis in INNERMOST_FIRST}
            sizes["data"] = 8
            for size in layout.values():
                sizes["data"] //= size
            stride, place, strides = 1, {}, {}
            for axis in INNERMOST_FIRST:
                strides[axis], place[axis] = stride, rank // stride % sizes[axis]
                stride *= sizes[axis]
            for axis in INNERMOST_FIRST:
                first = rank - place[axis] * strides[axis]
                ranks = [first + i * strides[axis] for i in range(sizes[axis])]
                assert axes[axis] == (place[axis], ranks), (layout, rank, axis)
            together = ("ulysses", "ring", "data")
            assert axes["gradient"][1] == sorted(r for r in range(8) if same_but(r, rank, sizes, together))
            assert axes["weights"][1] == sorted(r for r in range(8) if same_but(r, rank, sizes, ("tensor", "pipeline")))
            assert leads == all(place[axis] == 0 for axis in INNERMOST_FIRST if axis != "data")


def same_but(a, b, sizes, axes):
    """Whether two ranks are at the same place of every axis but these."""
    stride, same = 1, True
    for axis in INNERMOST_FIRST:
        same &= axis in axes or a // stride % sizes[axis] == b // stride % sizes[axis]
        stride *= sizes[axis]
    return same


def places(rank, layouts, ports):
    """Of each layout, this rank's place and the ranks of every axis; and whether it leads its replica."""
    from lumina.config.schema import ParallelConfig
    from lumina.parallel.mesh import close_mesh, open_mesh

    found = []
    for layout, port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        mesh = open_mesh(ParallelConfig(**layout))
        axes = {name: getattr(mesh, name) for name in (*INNERMOST_FIRST, "gradient", "weights")}
        found.append(({name: (axis.rank, list(axis.ranks)) for name, axis in axes.items()}, mesh.leads_replica))
        close_mesh(mesh)
    return found
