"""A Ray cluster as it is just now: the nodes that answer, and how many ranks they have room for.

`python -m luthier.training.executors.ray.cluster ADDRESS DEVICE NUM_RANKS NUM_THREADS` prints it as a line of JSON, for
a worker that has no Ray: a process joins one cluster, and has Ray's threads from then on.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from luthier.errors import InvalidArgument, LuthierError, Reason, Unavailable
from luthier.runtime.config import put
from luthier.training.executors.ray.orders import Fleet
from luthier.work.device import processor

NODE_LABEL = "ray.io/node-id"
"""Ray gives every node this label; its value is the node's id."""
_ANSWER_SECONDS = 2.0
_JOIN_SECONDS = 5.0
_TELL_SECONDS = 120.0
"""A node's first task starts an interpreter, which imports torch where there is a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster: what it has in all, whoever uses that just now."""

    node_id: str
    host: str
    port: int
    processors: float
    gpus: float

    def room(self, fleet: Fleet) -> int:
        """Return for how many ranks it has room."""
        has = {"CPU": self.processors, "GPU": self.gpus}
        return min(math.floor(has[name] / amount) for name, amount in fleet.rank_takes.items())


@contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """Be a driver in the cluster for the length of a block. It is left in order; a process that is killed leaves too.

    Raises:
        InvalidArgument: it is no address that a driver takes.
        Unavailable: no cluster is there, or this machine is none of its nodes.
    """
    require_address(address)
    if address != "auto":
        _require_answer(address)
    put(
        {
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_METRICS_ENABLED": "0",
        }
    )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _nowhere(address, str(error)) from error
    yield
    ray.shutdown()


def require_address(address: str) -> None:
    """Check what a worker is told of its cluster. Raises InvalidArgument."""
    if address == "auto" or re.fullmatch(r"[\w.\-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}", address):
        return
    more = (
        "; Ray's client does not carry ray.train, so the worker must run on a node"
        if "ray://" in address
        else ""
    )
    raise InvalidArgument(
        "the cluster of a worker (--ray-address, LUTHIER_WORKER_RAY_ADDRESS) must be auto or the host:port of its "
        f"head, got {address!r}{more}"
    )


def found_nodes() -> list[Node]:
    """Return the nodes that answer. Ray believes in one that has died for some twenty seconds: it is asked itself."""
    told = [
        Node(
            node_id=one["NodeID"],
            host=one["NodeManagerAddress"],
            port=one["NodeManagerPort"],
            processors=one["Resources"].get("CPU", 0.0),
            gpus=one["Resources"].get("GPU", 0.0),
        )
        for one in ray.nodes()
        if one["Alive"]
    ]
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda node: _answers(node.host, node.port, _ANSWER_SECONDS), told))
    return [node for node, answer in zip(told, answers, strict=True) if answer]


def described(nodes: Sequence[Node]) -> str:
    """Return what a cluster has, for people."""
    processors, gpus = sum(one.processors for one in nodes), sum(one.gpus for one in nodes)
    return f"{len(nodes)} nodes that answer, {processors:g} processors and {gpus:g} GPUs"


def require_room(nodes: Sequence[Node], fleet: Fleet) -> None:
    """Check that a cluster has room for a fleet. Raises InvalidArgument, which says for how many."""
    room = sum(node.room(fleet) for node in nodes)
    if room < fleet.num_ranks:
        each = " and ".join(f"{amount:g} {name}" for name, amount in fleet.rank_takes.items())
        raise InvalidArgument(
            f"a worker's ranks (LUTHIER_WORKER_RANKS) must be at most the {room} that the cluster {fleet.address} has "
            f"room for, with {each} each: it has {described(nodes)}; got {fleet.num_ranks}"
        )


def on_node(node_id: str) -> dict[str, str]:
    """Return what selects a node."""
    return {NODE_LABEL: node_id}


def asked_cluster(address: str, device: str, num_ranks: int, num_threads: int) -> dict[str, Any]:
    """Return what a worker is told before it registers, as JSON: error, or `device_kind` and a rank's `Equipment`.

    The equipment is that of the smallest node. `device` auto is the GPUs of a cluster that has any.
    """
    try:
        with joined_cluster(address):
            nodes = found_nodes()
            has_gpus = any(node.gpus for node in nodes)
            kind = "cpu" if device == "cpu" or (device == "auto" and not has_gpus) else "cuda"
            fleet = Fleet(address=address, num_ranks=num_ranks, device=kind, num_threads=num_threads)
            require_room(nodes, fleet)
            equipment = _told([node for node in nodes if node.room(fleet)], fleet)
    except LuthierError as error:
        return {"error": error.message}
    return {"device_kind": kind, **equipment}


def _told(nodes: Sequence[Node], fleet: Fleet) -> dict[str, Any]:
    """Return the equipment of a rank, and see that each node has this version.

    Raises:
        Unavailable: a node has not, or does not say.
        InvalidArgument: a GPU does not work.
    """
    asked = {
        node.host: _equipment_there.options(
            num_cpus=0, num_gpus=int(fleet.device == "cuda"), label_selector=on_node(node.node_id)
        ).remote(fleet.device)
        for node in nodes
    }
    found = []
    for host, answer in asked.items():
        try:
            told = ray.get(answer, timeout=_TELL_SECONDS)
        except RayError as error:
            raise Unavailable(
                f"the node {host} must run luthier's ranks, it cannot: {last_line(error)}"
            ) from error
        if error_text := told.get("error"):
            raise InvalidArgument(f"on the node {host}: {error_text}")
        require_version(host, told.pop("version"))
        found.append(told)
    return min(found, key=lambda told: int(told["memory_bytes"]))


def require_version(host: str, version: str) -> None:
    """Check that a node has the version that this process has. Raises Unavailable: CRASHED."""
    ours = importlib.metadata.version("luthier")
    if version != ours:
        raise Unavailable(
            f"each node must have luthier {ours}, as its driver has, {host} has {version}",
            reason=Reason.CRASHED,
        )


def last_line(error: BaseException) -> str:
    """Return the end of what Ray says of an error: the reason, below a trace of its own processes."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]  # Ray is not looked into
def _equipment_there(device: str) -> dict[str, Any]:
    equipment = asdict(processor())
    version = importlib.metadata.version("luthier")
    if device == "cpu":
        return {**equipment, "version": version}
    from luthier.lm.device import described as described_device

    told = described_device("cuda")
    if "error" in told:
        return told
    named = {"device": told["kind"], "device_name": told["name"], "memory_bytes": told["memory_bytes"]}
    return {**equipment, **named, "version": version}


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not _answers(host.strip("[]"), int(port), _JOIN_SECONDS):
        raise _nowhere(address, "nobody answers there")


def _answers(host: str, port: int, seconds: float) -> bool:
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def _nowhere(address: str, why: str) -> Unavailable:
    return Unavailable(
        f"a Ray cluster must be at {address} (--ray-address, LUTHIER_WORKER_RAY_ADDRESS) and this machine a node of "
        f"it, there is none: {' '.join(why.split())[:300]}; start one with `ray start --head`, then join it with "
        "`ray start --address=HOST:PORT`",
        reason=Reason.CRASHED,
    )


if __name__ == "__main__":
    place, wanted, ranks, threads = sys.argv[1:5]
    print(json.dumps(asked_cluster(place, wanted, int(ranks), int(threads))), flush=True)
