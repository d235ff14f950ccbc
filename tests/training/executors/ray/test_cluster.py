"""What a worker may be told of a cluster, and what it says where there is none."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from luthier.daemon.__main__ import main
from luthier.errors import InvalidArgument, Unavailable
from luthier.training.executors.ray.driver import found_fleet
from luthier.training.executors.ray.orders import Fleet
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.work.worker_config import WorkerConfig

WORKER = (sys.executable, "-m", "luthier.daemon", "worker", "training", "--executor", "ray")
FLEET = Fleet(address="10.0.0.1:6379", num_ranks=4)


def config_of(folder: Path, **said: Any) -> WorkerConfig:
    shared: dict[str, Any] = {
        "log_level": "INFO",
        "data_address": "",
        "training_address": "",
        "evaluation_address": "",
    }
    nobody: dict[str, Any] = dict.fromkeys(("reward_addresses", "judge_addresses", "judge_keys"), ())
    return WorkerConfig(home=folder, executor="ray", **nobody, **shared, **said)


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, r"pip install 'luthier\[ray\]'"), ("2.59.1", "needs Ray >= 2.60, got 2.59.1")],
    ids=["none", "old"],
)
def test_a_worker_without_ray_is_told_which_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    def version(name: str) -> str:
        assert name == "ray"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InvalidArgument, match=words):
        found_fleet(config_of(tmp_path))


def test_the_address_is_of_the_executor_ray() -> None:
    found = CliRunner().invoke(
        main, ["worker", "training", "--executor", "torchrun", "--ray-address", "auto"]
    )
    assert found.exit_code == 2
    assert "--ray-address is of the executor ray, not of torchrun" in found.output


class TestWithRay:
    """What needs the extra."""

    pytest.importorskip("ray", reason="needs the extra ray")

    @pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.ray.svc:6379", "[::1]:6379"])
    def test_an_address_is_a_heads(self, address: str) -> None:
        from luthier.training.executors.ray.cluster import require_address

        require_address(address)

    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("ray://10.0.0.1:10001", "got 'ray://10.0.0.1:10001'; Ray's client does not carry ray.train"),
            ("local", "must be auto or the host:port of its head, got 'local'"),
            ("", "got ''"),
        ],
    )
    def test_another_address_is_refused(self, address: str, words: str) -> None:
        from luthier.training.executors.ray.cluster import require_address

        with pytest.raises(InvalidArgument, match=words):
            require_address(address)

    @pytest.mark.parametrize(
        ("device", "num_threads", "room"),
        [("cpu", 1, 10), ("cpu", 4, 2), ("cpu", 16, 0), ("cuda", 1, 4), ("cuda", 4, 2)],
    )
    def test_a_node_has_room_for_what_all_of_a_rank_fits_on(
        self, device: str, num_threads: int, room: int
    ) -> None:
        from luthier.training.executors.ray.cluster import Node

        fleet = Fleet(address="auto", num_ranks=1, device=device, num_threads=num_threads)
        assert Node(node_id="a", host="h", port=1, processors=10.5, gpus=4.0).room(fleet) == room

    @pytest.mark.parametrize(
        ("least", "most", "nodes", "taken"),
        [(1, 8, 2, 4), (1, 8, 1, 2), (2, 0, 1, 2), (0, 0, 1, 1), (1, 3, 9, 3)],
    )
    def test_a_job_takes_what_worker_and_cluster_have(
        self, least: int, most: int, nodes: int, taken: int
    ) -> None:
        from luthier.training.executors.ray.fit import ranks_now

        job = FineTuningJob(ranks=RankRange(min_ranks=least, max_ranks=most))
        assert ranks_now(job, FLEET, [_node(str(number)) for number in range(nodes)]) == taken

    def test_a_cluster_that_shrank_below_the_least_ranks_says_what_it_has(self) -> None:
        from luthier.training.executors.ray.fit import ranks_now

        with pytest.raises(
            Unavailable, match=r"at least 4 ranks, the cluster 10.0.0.1:6379 has room for 2 now"
        ) as caught:
            ranks_now(FineTuningJob(ranks=RankRange(min_ranks=4)), FLEET, [_node("a")])
        assert caught.value.reason == "TOO_FEW_RANKS"
        assert caught.value.metadata == {"min_ranks": "4", "ranks": "2"}
        assert (
            "1 nodes that answer, 2 processors and 0 GPUs; add nodes, or lower ranks.min_ranks"
            in caught.value.message
        )

    def test_a_worker_that_has_too_few_itself_says_so(self) -> None:
        from luthier.training.executors.ray.fit import ranks_now

        with pytest.raises(Unavailable, match=r"this worker has 4: start one with --executor ray --ranks 5"):
            ranks_now(
                FineTuningJob(ranks=RankRange(min_ranks=5)),
                FLEET,
                [_node(str(number)) for number in range(9)],
            )

    def test_a_node_of_another_version_is_refused(self) -> None:
        from luthier.training.executors.ray.cluster import require_version

        require_version("h", importlib.metadata.version("luthier"))
        with pytest.raises(Unavailable, match=r"each node must have luthier .*, h has 0.0.9"):
            require_version("h", "0.0.9")

    def test_the_interface_is_that_of_the_nodes_address(self) -> None:
        from luthier.training.executors.ray.rank import interface_of

        assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
        assert interface_of("203.0.113.7") == ""

    def test_a_worker_whose_cluster_is_not_there_does_not_start(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and nobody listens
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            found = subprocess.run(
                [*WORKER, "--ranks", "2", "--ray-address", address],
                env={**os.environ, "LUTHIER_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        assert found.returncode == 1
        assert f"error: a Ray cluster must be at {address}" in found.stderr
        assert "nobody answers there; start one with `ray start --head`" in found.stderr


def _node(name: str) -> Any:
    from luthier.training.executors.ray.cluster import Node

    return Node(node_id=name, host=name, port=1, processors=2.0, gpus=0.0)
