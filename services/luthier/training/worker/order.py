"""What a driver orders of a process that computes, and what that may ask of it. Imports no torch and no gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.errors import Reason, ResourceExhausted
from luthier.grading.outcomes import GradingError
from luthier.lm.made import GgufType, HeldOut
from luthier.lm.precision import Precision
from luthier.lm.sources import Source
from luthier.v1 import fine_tuning_job_pb2, grader_pb2, rendering_pb2
from luthier.work.events import Severity
from luthier.worker.v1 import task_pb2, worker_service_pb2

_MAX_CHARACTERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingRows:
    """The rows of a rendering, read and kept here.

    Attributes:
        path: a file of `work.row_file`; each of its rows is a stream of Arrow, in the order of the rendering.
        rendering: as it was when the last row had come.
    """

    path: Path
    rendering: rendering_pb2.Rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOrder:
    """One TRAIN task.

    Attributes:
        task: with its specification.
        scratch: a folder for whatever it needs, which the driver deletes.
        renderings: the rows of the job's own rendering, then of those that it mixes in.
    """

    task: task_pb2.Task
    scratch: Path
    renderings: tuple[RenderingRows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterOrder:
    """One REGISTER_MODEL task: what `register_source` is given."""

    source: Source
    directory: Path
    scratch: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOrder:
    """One MERGE or EXPORT task.

    Attributes:
        model: folder with the files of the model with all its weights.
        adapter: folder with those of the adapter that is added to it; None: none.
        form: of the GGUF file to write; None: merged weights.
        title: name that an exported file gives its model.
        directory: where to write, made if missing.
        scratch: a folder for whatever else it needs.
        held_out: tokens that the result is to score.
        precision: what the model was held in while the adapter was trained.
        stop_token_ids: tokens that end an answer as it was taught, for a GGUF file.
    """

    model: Path
    adapter: Path | None
    form: GgufType | None
    title: str
    directory: Path
    scratch: Path
    held_out: HeldOut = ()
    precision: Precision = "BFLOAT16"
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """A training was paused as it was asked to: all that it made up to a step is in the last checkpoint."""

    step: int


TrainEnd = task_pb2.TrainResult | Paused
"""What becomes of a TRAIN task that does not fail."""


class Desk(Protocol):
    """What a training may tell its driver and ask of it. What the driver cannot do ends the training."""

    @property
    def task(self) -> task_pb2.Task:
        """As ordered."""
        ...

    @property
    def scratch(self) -> Path:
        """As ordered."""
        ...

    def check(self) -> None:
        """Go on, if the work is still wanted. Call it between units of work, often: it shows signs of life."""
        ...

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
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report values measured at `step`."""
        ...

    def measured(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Report what was measured of the attempt, for operators."""
        ...

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Report a line for people."""
        ...

    def pausing(self) -> bool:
        """Tell whether the job is to pause: store a checkpoint then, and end as `Paused`.

        Once it was called, the driver leaves it to whoever computes when that is; before, it ends the process.
        """
        ...

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Keep with the job what exactly runs; it is there when this returns."""
        ...

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the task's own service; do not change it."""
        ...

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Put a file of the task's own service into a folder under its own path; do not change it there."""
        ...

    def handed(self, step: int, paths: Sequence[Path]) -> list[Path]:
        """Return where files of a rank are for who begins the checkpoint of a step, which waits until they are there.

        Ranks of one machine see one another's files; others begin to send them. They stay as they are until
        `checkpoint_stored`.
        """
        ...

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Begin to make files, under their names, the checkpoint to resume from; one at a time.

        Training goes on meanwhile, and leaves the files as they are until `checkpoint_stored`.
        """
        ...

    def checkpoint_stored(self) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun, once it is the one to resume from."""
        ...

    def commit_rollouts(self, step: int, path: Path) -> None:
        """Keep what a step drew from its model, a file of `work.row_file`."""
        ...

    def scored(
        self, grader: grader_pb2.RemoteGrader, samples: Sequence[grader_pb2.Sample], most_errors: int
    ) -> list[float | GradingError]:
        """Return what a reward service says of each sample, as `work.rewards.scored` does."""
        ...


def out_of_memory(
    job: fine_tuning_job_pb2.FineTuningJob, text: str, micro_batch_tokens: int = 0, expected: str = ""
) -> ResourceExhausted:
    """Return OUT_OF_MEMORY for a job, with what a pass over its rows takes its memory by; `text` says what failed.

    `micro_batch_tokens` are those that were chosen, `expected` what they were expected to take.
    """
    tokens = micro_batch_tokens or job.hyperparameters.micro_batch_tokens
    size = f"micro_batch_tokens {tokens}"
    if job.HasField("reinforcement"):
        chosen = job.reinforcement
        size = f"num_samples {chosen.num_samples}, max_new_tokens {chosen.max_new_tokens} and {size}"
    plan = f"; {expected}" if expected else ""
    return ResourceExhausted(
        f"a step must fit in memory, with {size} it does not; make it smaller: {text[:_MAX_CHARACTERS]}{plan}",
        reason=Reason.OUT_OF_MEMORY,
        metadata={"micro_batch_tokens": str(tokens)},
    )
