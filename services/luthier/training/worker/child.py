"""The process of one training, registration, merge or export: `python -m luthier.training.worker.child`.

`luthier.work.nursery` starts the process that it is forked from. It has torch and the device; no connection, no
credential and no setting. What it needs it asks of its driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from luthier.grading.outcomes import GradingError
from luthier.lm.importing import uncollected
from luthier.lm.made import Made
from luthier.lm.sources import RegisteredFiles
from luthier.runtime.logs import configure
from luthier.storage.disk import found_full
from luthier.training.executors.ranks import RankOrder
from luthier.training.executors.ray.orders import RayOrder
from luthier.training.worker.order import MakeOrder, RegisterOrder, TrainEnd, TrainOrder
from luthier.v1 import fine_tuning_job_pb2, grader_pb2
from luthier.work.child import Line, Work, serve
from luthier.work.device import Setup
from luthier.work.events import Severity
from luthier.worker.v1 import task_pb2, worker_service_pb2


def main() -> None:
    """Do what the driver orders."""
    serve(prepare, begin)


def begin(setup: Setup) -> None:
    """Import all that an order may need, and load a model for practice.

    Raises:
        InvalidArgument: the device is one that this torch was not built for.
    """
    configure(setup.log_level)
    with uncollected():
        import torch
        from tqdm import tqdm  # type: ignore[import-untyped]

        from luthier.lm.device import choose_device

        # Here no device can be opened, so one that is not there is refused at once: transformers takes much longer.
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            choose_device(setup.device)
        import luthier.lm.exporting
        import luthier.lm.register
        import luthier.training.executors.joining
        import luthier.training.worker.computing  # noqa: F401
        from luthier.lm.rehearsal import rehearse

        # A bar of progress, as of reading GGUF files, would start a thread that looks after it, and stays.
        tqdm.monitor_interval = 0
        rehearse()


def prepare(setup: Setup) -> Work:
    """Return what does an order on the device, which the work opens."""
    import torch

    from luthier.lm.register import register_source
    from luthier.training.executors.joining import RankDesk, joined
    from luthier.training.worker.computing import computed
    from luthier.training.worker.making import make_here
    from luthier.training.worker.tokenizers_apart import tokenizers_apart

    device = torch.device(setup.device)
    if setup.num_threads:
        torch.set_num_threads(setup.num_threads)

    def train(line: Line, order: TrainOrder | RankOrder | RayOrder) -> TrainEnd:
        if isinstance(order, RayOrder):
            # A library that not every worker has, and not before a fork.
            from luthier.training.executors.ray.fit import fitted

            return fitted(line, order)
        if isinstance(order, TrainOrder):
            return computed(order, ChildDesk(line, order), device)
        with joined(order, device) as own:
            desk = RankDesk(ChildDesk(line, order.order), own.collective, own.asking)
            return computed(order.order, desk, own.device, own.collective)

    def work(
        line: Line, order: TrainOrder | RankOrder | RayOrder | RegisterOrder | MakeOrder
    ) -> TrainEnd | RegisteredFiles | Made:
        try:
            if isinstance(order, MakeOrder):
                return make_here(order, line.alive, tokenizers_apart(order.scratch, line.alive))
            if isinstance(order, RegisterOrder):
                apart = tokenizers_apart(order.scratch, line.alive)
                return register_source(order.source, order.directory, scratch=order.scratch, apart=apart)
            return train(line, order)
        except Exception as error:
            scratch = order.order.scratch if isinstance(order, RankOrder | RayOrder) else order.scratch
            if full := found_full(error, scratch):
                raise full from error
            raise

    return work


class Telling(Protocol):
    """A line to a driver: `work.child.Line`, or one that comes from further away."""

    def alive(self) -> None:
        """Say that the work goes on; it costs nothing when called often."""
        ...

    def tell(self, name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> None:
        """Tell the driver something that it does not answer."""
        ...

    def ask(self, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Return what the driver answers."""
        ...


class ChildDesk:
    """The driver as the process that trains sees it: a `Desk` at the other end of a line."""

    def __init__(self, line: Telling, order: TrainOrder) -> None:
        self.task = order.task
        self.scratch = order.scratch
        self._line = line

    def check(self) -> None:
        """Go on: the driver ends this process when the work is wanted no more."""
        self._line.alive()

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
        """Report progress; total 0 and remaining_seconds 0 mean not known."""
        named = {"remaining_seconds": remaining_seconds, "step": step}
        self._line.tell("progress", (phase, completed, total, unit), named)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report values measured at `step`."""
        self._line.tell("metrics", (step, dict(values)))

    def measured(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Report what was measured of the attempt, for operators."""
        self._line.tell("measured", (figures,))

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Report a line for people."""
        self._line.tell("log", (text, severity, step))

    def pausing(self) -> bool:
        """Tell whether the job is to pause."""
        asked: bool = self._line.ask("pausing")
        return asked

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Keep with the job what exactly runs; it is there when this returns."""
        self._line.ask("run_record", (record,))

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the task's own service; do not change it."""
        path: Path = self._line.ask("fetch", (file,))
        return path

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Put a file of the task's own service into a folder under its own path; do not change it there."""
        path: Path = self._line.ask("fetch_into", (folder, file))
        return path

    def handed(self, step: int, paths: Sequence[Path]) -> list[Path]:
        """Return the files: who begins the checkpoint sees them where they are."""
        del step
        return list(paths)

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Begin to make files, under their names, the checkpoint to resume from; one at a time."""
        self._line.tell("begin_checkpoint", (step, list(paths), dict(metrics)))

    def checkpoint_stored(self) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun, once it is the one to resume from."""
        files: list[task_pb2.BlobFile] = self._line.ask("checkpoint_stored")
        return files

    def commit_rollouts(self, step: int, path: Path) -> None:
        """Keep what a step drew from its model, a file of `work.row_file`."""
        self._line.ask("commit_rollouts", (step, path))

    def scored(
        self, grader: grader_pb2.RemoteGrader, samples: Sequence[grader_pb2.Sample], most_errors: int
    ) -> list[float | GradingError]:
        """Return what a reward service says of each sample."""
        found: list[float | GradingError] = self._line.ask("scored", (grader, list(samples), most_errors))
        return found


if __name__ == "__main__":
    main()
