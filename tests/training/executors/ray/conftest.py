"""The same services as for workers, and a cluster of two nodes."""

from collections.abc import Iterator

import pytest
from tests.training.executors.ray.clusters import LocalCluster, cluster_of
from tests.training.worker.conftest import model_folder, site

from luthier.work.children import Children, Program
from luthier.work.device import Setup

__all__ = ["model_folder", "site"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    setup = Setup(device="cpu", num_threads=1, log_level="INFO")
    with Children(Program(command=("-P", "-m", "luthier.training.worker.child"), setup=setup)) as made:
        yield made
