"""The process of one training or registration: `python -m luthier.training.worker.child`.

`luthier.work.children` starts it. It has torch and the device; no connection, no credential and no setting. What it
needs it asks of its driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.grading.outcomes import GradingError
from luthier.lm.importing import uncollected
from luthier.lm.sources import RegisteredFiles
from luthier.runtime.logs import configure
from luthier.storage.disk import found_full
from luthier.training.worker.order import RegisterOrder, Setup, TrainOrder
from luthier.v1 import fine_tuning_job_pb2, grader_pb2
from luthier.work.child import Line, Work, serve
from luthier.work.events import Severity
from luthier.worker.v1 import task_pb2


def main() -> None:
    """Do what the driver orders."""
    serve(prepare)


def prepare(setup: Setup) -> Work:
    """Import all that an order may need and return what does it.

    Raises:
        InvalidArgument: the device is not there.
    """
    configure(setup.log_level)
    with uncollected():
        import torch

        from luthier.lm.device import choose_device

        # A device that is not there is refused before transformers is imported, which takes much longer.
        device = choose_device(setup.device)
        from luthier.lm.register import register_source
        from luthier.lm.rehearsal import rehearse
        from luthier.training.worker.computing import computed

        if setup.num_threads:
            torch.set_num_threads(setup.num_threads)
        rehearse()

    def work(line: Line, order: TrainOrder | RegisterOrder) -> task_pb2.TrainResult | RegisteredFiles:
        try:
            if isinstance(order, RegisterOrder):
                return register_source(order.source, order.directory, scratch=order.scratch)
            return computed(order, ChildDesk(line, order), device)
        except Exception as error:
            if full := found_full(error, order.scratch):
                raise full from error
            raise

    return work


class ChildDesk:
    """The driver as the process that trains sees it: a `Desk` at the other end of a line."""

    def __init__(self, line: Line, order: TrainOrder) -> None:
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

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Report a line for people."""
        self._line.tell("log", (text, severity, step))

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

    def store_checkpoint(
        self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]
    ) -> list[task_pb2.BlobFile]:
        """Store files under their names and make them the checkpoint to resume from."""
        files: list[task_pb2.BlobFile] = self._line.ask(
            "store_checkpoint", (step, list(paths), dict(metrics))
        )
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
