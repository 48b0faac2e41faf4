"""Shared by all tests: shapes in public signatures are checked, and no test reaches a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("lumina", "beartype.beartype")
# An example is right or wrong; how long it takes, or its making, is the business of whatever else runs beside it.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the digit shards, written once."""
    from lumina.data.recipes.digits import write_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder
