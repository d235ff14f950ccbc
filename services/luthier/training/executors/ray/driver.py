"""The worker's side of a training on a Ray cluster. It has neither Ray nor torch: a child of it joins the cluster."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from luthier.errors import InvalidArgument
from luthier.training.executors.inline import STEP, calls_of
from luthier.training.executors.ranks import ranks_for
from luthier.training.executors.ray.orders import Fleet, RayOrder
from luthier.training.worker.order import TrainEnd, TrainOrder
from luthier.training.worker.train import TaskDesk
from luthier.work.children import Calls, Children
from luthier.work.context import TaskContext
from luthier.work.device import ChosenDevice, answer_of
from luthier.work.requirements import Equipment
from luthier.work.worker_config import WorkerConfig
from luthier.worker.v1 import task_pb2

_LEAST_VERSION = (2, 60)
_DEVICES = ("auto", "cpu", "cuda", "rocm")


class OnRay:
    """Trains on the ranks of a cluster, as many as a job takes and the worker and the cluster have."""

    def __init__(self, children: Children, fleet: Fleet) -> None:
        self._children = children
        self._fleet = fleet

    def __call__(self, order: TrainOrder, desk: TaskDesk, context: TaskContext) -> TrainEnd:
        """Return what the first rank made.

        Raises:
            Unavailable: TOO_FEW_RANKS, of the worker or of the cluster as it is now; RANK_LOST, which names the rank;
                STALLED, no step was made for long; CRASHED, the process that had joined the cluster; RANKS_DIVERGED.
            ResourceExhausted: OUT_OF_MEMORY, of any rank.
            LuthierError: what the training raised, or the task's context.
        """
        num_ranks = ranks_for(order.task.train.job, self._fleet.num_ranks, "ray")
        if num_ranks < self._fleet.num_ranks:
            context.log(
                f"trains on {num_ranks} of this worker's {self._fleet.num_ranks} ranks: ranks.max_ranks says no more"
            )
        calls: Calls = {**calls_of(desk), "checkpoint_ready": _unless_stored(context)}
        result: TrainEnd = self._children.run(RayOrder(order=order, fleet=self._fleet), calls, context, STEP)
        return result


class _NotYet(Exception):
    """A checkpoint is still being stored."""


def _unless_stored(context: TaskContext) -> Callable[[], list[task_pb2.BlobFile] | None]:
    """Return what says whether a checkpoint is stored, and does not wait for it: more may be said meanwhile."""

    def still_wanted() -> None:
        context.heed()
        raise _NotYet

    def files() -> list[task_pb2.BlobFile] | None:
        try:
            return context.checkpoint_stored(still_wanted)
        except _NotYet:
            return None

    return files


def found_fleet(config: WorkerConfig) -> tuple[Fleet, ChosenDevice]:
    """Return the ranks that a worker has in its cluster, and the device of each.

    The device's name is that of the worker's own processes: they compute nothing but a model's registration.

    Raises:
        InvalidArgument: Ray is not installed, the device is none that a cluster gives, or there is no room for so many
            ranks.
        Unavailable: no cluster is there.
    """
    _require_ray()
    if config.device not in _DEVICES:
        raise InvalidArgument(
            f"a worker's device (LUTHIER_WORKER_DEVICE) must be {', '.join(_DEVICES[:-1])} or {_DEVICES[-1]} with the "
            f"executor ray, which gives each rank a GPU of its own, got {config.device!r}"
        )
    num_threads = config.num_threads or 1
    found = _asked(config, num_threads)
    fleet = Fleet(
        address=config.ray_address,
        num_ranks=config.ranks,
        device=found.pop("device_kind"),
        num_threads=num_threads,
    )
    return fleet, ChosenDevice(name="cpu", equipment=Equipment(**found), num_available=config.ranks)


def _asked(config: WorkerConfig, num_threads: int) -> dict[str, Any]:
    words = (config.ray_address, config.device, str(config.ranks), str(num_threads))
    command = ("-P", "-m", "luthier.training.executors.ray.cluster", *words)
    found = answer_of(
        command, f"the Ray cluster {config.ray_address}", "LUTHIER_WORKER_EXECUTOR=inline asks none"
    )
    if error := found.get("error"):
        raise InvalidArgument(error)
    return found


def _require_ray() -> None:
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError as error:
        raise InvalidArgument(
            "the executor ray needs Ray, which is not installed: pip install 'luthier[ray]', on every node of the "
            "cluster"
        ) from error
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        raise InvalidArgument(
            f"the executor ray needs Ray >= {least}, got {found}: pip install -U 'luthier[ray]'"
        )
