"""One cluster for all tests of this folder; every test leaves it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Unavailable
from tests.cluster.faults import End, end_undisturbed, slow_run

NUM_NODES = 3


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """head and three nodes. All hosts see every temporary directory of pytest; their own /tmp is private."""
    if os.environ.get("HARNESS_NO_CLUSTER") == "1":
        pytest.skip("HARNESS_NO_CLUSTER=1")
    shared = tmp_path_factory.getbasetemp()
    try:
        cluster = Cluster(shared / "cluster", shared, NUM_NODES)
    except Unavailable as reason:
        pytest.skip(f"no cluster can be made here: {reason}")
    yield cluster
    cluster.close()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of the cluster: no process of it is left on any host, and all nodes are idle again."""
    yield
    if "cluster" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        cluster.restore()
        left = cluster.leftovers()
        cluster.settle()
        assert not left


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> End:
    """The end of `slow_run` when nothing happens to it."""
    return end_undisturbed(slow_run(tmp_path_factory.mktemp("undisturbed"), tiny_models["mbart"]))
