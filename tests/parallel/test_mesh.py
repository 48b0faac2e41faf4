"""What each launcher says of a process, read from its environment."""

import pytest

from lumina.parallel.mesh import _LAUNCHERS, World

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*ADDRESS, *(name for launcher in _LAUNCHERS for name in launcher)):
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
