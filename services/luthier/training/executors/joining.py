"""A rank as it is inside: it finds the others, and speaks for all where it is the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from luthier.grading.outcomes import GradingError
from luthier.runtime.config import put
from luthier.training.executors.pulse import Pulse
from luthier.training.executors.ranks import RankOrder
from luthier.training.recipe_settings import is_divided
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.process_group import Replicas
from luthier.training.worker.order import Desk
from luthier.v1 import fine_tuning_job_pb2, grader_pb2
from luthier.work.events import Severity
from luthier.worker.v1 import task_pb2, worker_service_pb2

_WAIT = timedelta(days=30)
"""The first rank may wait for its service for as long as that is away: who waits too long is the driver's to say."""
Asking = Callable[[], AbstractContextManager[None]]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A rank among the others.

    Attributes:
        collective: all of them.
        device: of this one.
        asking: gives a block in which it waits for its driver.
    """

    collective: Collective
    device: torch.device
    asking: Asking


@contextmanager
def joined(order: RankOrder, device: torch.device) -> Iterator[Joined]:
    """Give a rank among the others for the length of a block.

    The environment is what torchrun sets, for libraries that look there. Ranks find one another by a file and speak
    over the loopback interface alone.
    """
    put(
        {
            "RANK": str(order.rank),
            "LOCAL_RANK": str(order.rank),
            "WORLD_SIZE": str(order.num_ranks),
            "LOCAL_WORLD_SIZE": str(order.num_ranks),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    torch.set_num_threads(order.num_threads)
    if device.type == "cuda":
        device = torch.device("cuda", order.rank)
        torch.cuda.set_device(device)
    pulse = Pulse(order.pulse)
    store = FileStore(str(order.meeting / "store"), order.num_ranks)
    # One that is given keeps a limit of its own, which ends who waits for the first rank's files.
    store.set_timeout(_WAIT)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            # NCCL joins here, and not within the first exchange, which is watched.
            device_id=device if device.type == "cuda" else None,
            rank=order.rank,
            world_size=order.num_ranks,
            timeout=_WAIT,
        )
        replicas = Replicas(device, pulse, passes_together=is_divided(order.order.task.train.job))
        with pulse.working() if device.type == "cpu" else nullcontext():
            yield Joined(collective=replicas, device=device, asking=pulse.asking)
        dist.destroy_process_group()
    finally:
        pulse.close()


class RankDesk:
    """The desk of one rank: the first tells, stores and asks for all, the others fetch and work.

    Args:
        desk: of the rank itself.
        collective: all ranks.
        asking: gives a block in which the rank waits for its driver.
    """

    def __init__(self, desk: Desk, collective: Collective, asking: Asking = nullcontext) -> None:
        self.task = desk.task
        self.scratch = desk.scratch
        self.check = desk.check
        self.handed = desk.handed
        self._desk = desk
        self._collective = collective
        self._asking = asking

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the task's own service; do not change it."""
        with self._asking():
            return self._desk.fetch(file)

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Put a file of the task's own service into a folder under its own path; do not change it there."""
        with self._asking():
            return self._desk.fetch_into(folder, file)

    def progress(
        self,
        phase: str,
        completed: int,
        total: int,
        unit: str,
        *,
        remaining_seconds: float = 0.0,
        step: int = 0,
    ) -> None:
        """Report progress, which is that of all ranks."""
        if self._is_first:
            self._desk.progress(phase, completed, total, unit, remaining_seconds=remaining_seconds, step=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report values measured at `step`, which all ranks have."""
        if self._is_first:
            self._desk.metrics(step, values)

    def measured(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Report what was measured of the first rank."""
        if self._is_first:
            self._desk.measured(figures)

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Report a line for people; other ranks than the first write what they would say into the worker's log."""
        if self._is_first:
            self._desk.log(text, severity, step)
        else:
            _logger.log(logging.getLevelName(severity), text, extra={"rank": self._collective.rank})

    def pausing(self) -> bool:
        """Tell whether the job is to pause: the first rank's call."""
        assert self._is_first, "the first rank asks for all"
        with self._asking():
            return self._desk.pausing()

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Report what exactly runs."""
        if self._is_first:
            with self._asking():
                self._desk.run_record(record)

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Begin to make files, of all ranks, the checkpoint to resume from: the first rank does."""
        if self._is_first:
            self._desk.begin_checkpoint(step, paths, metrics)

    def checkpoint_stored(self) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun; all ranks wait until it is the one to resume from."""
        return self._collective.of_first(self._stored)

    def commit_rollouts(self, step: int, path: Path) -> None:
        """Keep what a step drew from its model: the first rank's call."""
        assert self._is_first, "the first rank keeps for all"
        with self._asking():
            self._desk.commit_rollouts(step, path)

    def scored(
        self, grader: grader_pb2.RemoteGrader, samples: Sequence[grader_pb2.Sample], most_errors: int
    ) -> list[float | GradingError]:
        """Return what a reward service says of each sample: the first rank's call."""
        assert self._is_first, "the first rank grades for all"
        with self._asking():
            return self._desk.scored(grader, samples, most_errors)

    def _stored(self) -> list[task_pb2.BlobFile]:
        with self._asking():
            return self._desk.checkpoint_stored()

    @property
    def _is_first(self) -> bool:
        return self._collective.rank == 0
