"""Fine-tuning jobs and checkpoints as values: states, settings, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from luthier.errors import Failure
from luthier.training.teaching import Taught


class JobState(StrEnum):
    """Where a job stands; see the FineTuningJob.State enum of the API."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    # FAILED: no worker could be told what to do.
    JobState.QUEUED: frozenset({JobState.PREPARING, JobState.CANCELLED, JobState.FAILED}),
    JobState.PREPARING: frozenset(
        {
            JobState.QUEUED,
            JobState.RUNNING,
            JobState.CANCELLING,
            JobState.CANCELLED,
            JobState.SUCCEEDED,
            JobState.FAILED,
        }
    ),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.CANCELLING, JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}
    ),
    # A worker may end its work, or fail, before it hears that it should stop.
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.CANCELLED: frozenset(),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
}
"""Every legal change of state."""


class LearningRateSchedule(StrEnum):
    """Course of the learning rate after warm-up."""

    CONSTANT = "CONSTANT"
    LINEAR = "LINEAR"
    COSINE = "COSINE"


class Determinism(StrEnum):
    """What a resumed run shares with one that was never interrupted."""

    UNSPECIFIED = "UNSPECIFIED"
    BITWISE = "BITWISE"
    BEST_EFFORT = "BEST_EFFORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter to train, all defaults filled in; empty target_modules: all linear modules but the head."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """How to train, all defaults filled in; exactly one of batch_tokens and batch_rows is not 0."""

    num_epochs: int
    max_steps: int
    batch_tokens: int
    batch_rows: int
    micro_batch_tokens: int
    learning_rate: float
    warmup_steps: int
    learning_rate_schedule: LearningRateSchedule
    weight_decay: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the job has come; total 0 and remaining_seconds 0 mean not known."""

    phase: str
    completed: int
    total: int
    unit: str
    remaining_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What exactly runs; see the RunRecord message of the API."""

    code_version: str
    base_model_digest: str
    rendering_digest: str
    device: str
    torch_version: str
    num_threads: int
    kernel_table_digest: str
    kernels: Mapping[str, str]
    determinism: Determinism


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A fine-tuning job.

    Attributes:
        base_model_digest: digest that the base model had when the job was created.
        rendering_digest: digest that the rendering had when the job was created.
        max_checkpoints: checkpoints kept besides the best; 0 in jobs of before it could be said: all are kept.
        taught: how the rendering teaches; None for jobs created before this was kept.
        tuned_model: name of the tuned model; empty until SUCCEEDED.
        failure: why it failed; None unless FAILED.
    """

    name: str
    uid: str
    state: JobState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    display_name: str
    base_model: str
    rendering: str
    base_model_digest: str
    rendering_digest: str
    lora: LoraSettings
    hyperparameters: Hyperparameters
    checkpoint_interval_steps: int
    validation_interval_steps: int
    tuned_model_id: str
    max_checkpoints: int = 0
    taught: Taught | None = None
    tuned_model: str = ""
    progress: Progress | None = None
    latest_metrics: Mapping[str, float] = field(default_factory=dict)
    num_attempts: int = 0
    run_record: RunRecord | None = None
    failure: Failure | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None

    @property
    def etag(self) -> str:
        """The revision as HTTP writes entity tags."""
        return f'"{self.revision}"'

    @property
    def final(self) -> bool:
        """Whether the state never changes again."""
        return not TRANSITIONS[self.state]

    def moved(self, state: JobState, now: datetime) -> Job:
        """Return the job in another state, with its start or end time set where the state says so.

        The change must be legal: an illegal one is a fault of the service and stops the transaction.
        """
        assert state in TRANSITIONS[self.state], f"{self.name} cannot go from {self.state} to {state}"
        job = replace(self, state=state)
        if state is JobState.PREPARING and job.start_time is None:
            job = replace(job, start_time=now)
        return replace(job, end_time=now) if job.final else job


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint: its path, digest in hex and size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A point that a job can be resumed from.

    Attributes:
        job: name of the job.
        step: optimiser steps made.
        attempt: attempt that made it.
        digest: sha256 over names and digests of the files.
    """

    name: str
    uid: str
    job: str
    step: int
    attempt: int
    metrics: Mapping[str, float]
    files: tuple[CheckpointFile, ...]
    digest: str
    size_bytes: int
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPoint:
    """Metrics of one step, from the last attempt that made it."""

    step: int
    attempt: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job would do; see the FineTuningPlan message of the API."""

    num_train_rows: int
    num_validation_rows: int
    num_steps: int
    num_steps_per_epoch: int
    num_tokens: int
    num_supervised_tokens: int
    packing_efficiency: float
    num_dropped: int
    num_truncated: int
    num_unsupervised: int
    warnings: tuple[str, ...]
