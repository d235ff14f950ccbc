"""A rank as it is inside, on whatever machine of the cluster: a process of Ray's that has torch and the device."""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, get_device

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.lm.importing import uncollected
from luthier.runtime.config import others, put, read
from luthier.runtime.logs import configure
from luthier.storage.disk import found_full
from luthier.storage.files import path_below
from luthier.training.executors.pulse import Pulse
from luthier.training.executors.ranks import pulse_path
from luthier.training.executors.ray.cluster import last_line
from luthier.training.executors.ray.files import NodeFiles
from luthier.training.executors.ray.orders import FarRows, Part
from luthier.training.executors.ray.sentry import node_home
from luthier.training.recipe_settings import is_divided, rendering_names
from luthier.training.worker.child import ChildDesk
from luthier.training.worker.order import RenderingRows, TrainEnd, TrainOrder
from luthier.training.worker.whereabouts import pass_named
from luthier.work.cache import BlobCache
from luthier.work.child import ALIVE_SECONDS, named
from luthier.work.worker_config import WorkerConfig
from luthier.worker.v1 import task_pb2

_SIOCGIFADDR = 0x8915
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_TIMEOUT_SECONDS = 30 * 24 * 3600
"""An exchange waits for as long as another rank takes: the sentries' sights say who hangs."""
_logger = logging.getLogger(__name__)


class RankConfig(TorchConfig):  # type: ignore[misc]  # Ray is not looked into
    """How ranks find one another: Ray's way, over the interface that the node has its address on."""

    def __init__(self) -> None:
        super().__init__(timeout_s=_TIMEOUT_SECONDS)

    @property
    def backend_cls(self) -> type[Any]:
        """What sets up the group."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Have gloo speak over the interface of the node's address, unless the node's environment says which.

    By itself it takes that of the host's name, which on many machines is an address of the machine alone.
    """
    address = ray.util.get_node_ip_address()
    if _GLOO_INTERFACE not in others() and (interface := interface_of(address)):
        put({_GLOO_INTERFACE: interface})


def interface_of(address: str) -> str:
    """Return the name of the interface that has an IPv4 address; empty: none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            found = socket.inet_ntoa(answer[20:24])
            # All of 127.0.0.0/8 is on the interface of 127.0.0.1.
            if address == found or (found == "127.0.0.1" and address.startswith("127.")):
                return name
    return ""


def train(given: Mapping[str, Any]) -> None:
    """Do this rank's part of a training; its result and what goes wrong go by the post. What Ray calls."""
    part: Part = given["part"]
    wire = Wire(given["post"], ray.train.get_context().get_world_rank())
    folder = node_home() / part.attempt
    config = read(WorkerConfig, section="WORKER")
    configure(config.log_level)
    scratch = folder / f"rank-{wire.rank}"
    scratch.mkdir(parents=True)
    cache = BlobCache(config.home / "cache", config.cache_bytes)
    try:
        # The driver sees no file of this machine.
        with pass_named(scratch, rendering_names(part.task.train.job)):
            result = _trained(part, wire, folder, NodeFiles(wire.post, cache, folder / "taking", wire.alive))
        # A process that ends takes with it what it has not sent.
        ray.get(wire.tell("done", (result,)))
    except Exception as error:
        # Whoever drives ends this process then: an end of its own would hide that of another rank from Ray.
        wire.ask("refused", (found_full(error, scratch) or named(error),))


def _trained(part: Part, wire: Wire, folder: Path, files: NodeFiles) -> TrainEnd:
    with uncollected():
        from luthier.training.executors.joining import RankDesk
        from luthier.training.recipes.process_group import Replicas
        from luthier.training.worker.computing import computed

    torch.set_num_threads(part.num_threads)
    device = get_device() if part.device == "cuda" else torch.device("cpu")
    scratch = folder / f"rank-{wire.rank}"
    rows = tuple(_rows(files, one, scratch / f"rows-{number}") for number, one in enumerate(part.rows))
    order = TrainOrder(task=part.task, scratch=scratch, renderings=rows)
    desk = FarDesk(wire, files, order, part.place)
    # NCCL joins within the first exchange, which takes long and is nobody's fault.
    dist.all_reduce(torch.zeros(1, device=device))
    pulse = Pulse(pulse_path(folder, wire.rank))
    try:
        if part.num_ranks == 1:
            return computed(order, desk, device)
        collective = Replicas(device, pulse, passes_together=is_divided(part.task.train.job))
        with pulse.working() if device.type == "cpu" else nullcontext():
            return computed(order, RankDesk(desk, collective, pulse.asking), device, collective)
    finally:
        pulse.close()


def _rows(files: NodeFiles, rows: FarRows, target: Path) -> RenderingRows:
    return RenderingRows(
        path=files.take(rows.sha256, target, lambda: rows.size_bytes), rendering=rows.rendering
    )


class Wire:
    """A rank's line to its driver, by the post. A post that is gone ends the rank's work, as its driver is gone."""

    def __init__(self, post: Any, rank: int) -> None:
        self.post = post
        self.rank = rank
        self._said_at = time.monotonic()

    def alive(self) -> None:
        """Say that the work goes on; it costs nothing when called often."""
        if time.monotonic() - self._said_at >= ALIVE_SECONDS:
            self.tell("alive")

    def tell(self, name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Any:
        """Tell the driver something that it does not answer; returns what can be waited for until the post has it."""
        self._said_at = time.monotonic()
        return self.post.tell.remote(self.rank, name, arguments, named)

    def ask(self, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Return what the driver answers. Raises Unavailable: CRASHED, there is no driver any more."""
        try:
            return ray.get(self.post.ask.remote(self.rank, name, arguments))
        except ray.exceptions.RayActorError as error:
            raise Unavailable("the driver of the ranks is gone", reason=Reason.CRASHED) from error


class FarDesk:
    """The driver as a rank on another machine sees it: a `Desk`, whose files travel.

    Args:
        wire: to the driver.
        files: of this rank.
        order: of its training.
        place: the folder on the driver's machine where files of ranks go.
    """

    def __init__(self, wire: Wire, files: NodeFiles, order: TrainOrder, place: Path) -> None:
        self._near = near = ChildDesk(wire, order)
        self.task = near.task
        self.scratch = near.scratch
        self.check = near.check
        self.progress = near.progress
        self.metrics = near.metrics
        self.measured = near.measured
        self.log = near.log
        self.pausing = near.pausing
        self.run_record = near.run_record
        self.scored = near.scored
        self._wire = wire
        self._files = files
        self._place = place
        self._threads = ThreadPoolExecutor(1, "sending")
        self._sending: list[Future[None]] = []

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the task's own service; do not change it."""
        return self._taken(file, path_below(self.scratch / ".pinned", file.sha256))

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Put a file of the task's own service into a folder under its own path; do not change it there."""
        return self._taken(file, path_below(folder, file.path))

    def handed(self, step: int, paths: Sequence[Path]) -> list[Path]:
        """Begin to send files of a checkpoint, and return where the driver will find them; training goes on."""
        folder = f"step-{step}"
        self._sending.append(self._threads.submit(self._send, list(paths), folder))
        return [self._place / folder / path.name for path in paths]

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Have files be the checkpoint to resume from once they have all come, those that another rank handed too."""
        own = [path for path in paths if not path.is_relative_to(self._place)]
        places = dict(zip(own, self.handed(step, own), strict=True))
        self._near.begin_checkpoint(step, [places.get(path, path) for path in paths], metrics)

    def checkpoint_stored(self) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun, once it is the one to resume from."""
        for sending in self._sending:
            sending.result()
        self._sending.clear()
        return self._near.checkpoint_stored()

    def commit_rollouts(self, step: int, path: Path) -> None:
        """Keep what a step drew from its model, a file of `work.row_file`."""
        folder = f"rollouts-{step}"
        self._files.send([path], folder)
        self._near.commit_rollouts(step, self._place / folder / path.name)

    def _send(self, paths: list[Path], folder: str) -> None:
        try:
            self._files.send(paths, folder)
        except Exception as error:
            self._wire.tell("unsent", (self._unsent(error),))
            raise
        self._wire.tell("come", ([self._place / folder / path.name for path in paths],))

    def _unsent(self, error: Exception) -> LuthierError:
        if isinstance(error, LuthierError):
            return error
        return Unavailable(
            f"files of rank {self._wire.rank} have not come to its driver: {last_line(error)}",
            reason=Reason.CRASHED,
        )

    def _taken(self, file: task_pb2.BlobFile, target: Path) -> Path:
        return self._files.take(file.sha256, target, lambda: int(self._wire.ask("bring", (file,))))
