"""Hosts, where they can be had: tests marked `multinode` are skipped elsewhere, and say why."""

import pytest

from tests.launch.cluster import Cluster, missing


@pytest.fixture(scope="session")
def no_hosts():
    """Why there can be none; empty where there can."""
    return missing()


@pytest.fixture
def cluster_of(no_hosts, tmp_path_factory):
    """`cluster_of(["a", "b"])`: a `Cluster` that is closed after the test."""
    if no_hosts:
        pytest.skip(f"multinode: {no_hosts}")
    clusters = []

    def make(names, **options):
        clusters.append(Cluster(names, tmp_path_factory.mktemp("hosts"), **options))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()
