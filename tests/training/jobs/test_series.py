"""Series of jobs: there while a job trains, at most 20 each, quick to form, and gone when it ends."""

from __future__ import annotations

import time
from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest

from luthier.errors import Failure
from luthier.runtime.catalogue import training
from luthier.training.jobs.series import JobSeries
from luthier.training.recipes.phases import PHASES
from luthier.v1.event_pb2 import Event, MetricValues, Progress
from luthier.work.tasks import Outcome, Task, TaskKind, TaskState
from luthier.worker.v1.task_pb2 import TaskResult
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest, TaskFigures

TASK = Task(
    task_id="t",
    kind=TaskKind.TRAIN,
    uid="u",
    subject="projects/p/fineTuningJobs/a",
    project="p",
    resources=(),
    state=TaskState.LEASED,
    epoch=1,
    attempt=1,
    worker="w@1",
    cancel_requested=False,
    last_local_number=0,
    losses=0,
    heard=True,
)
EVERYTHING = dict.fromkeys(
    [
        "train_loss",
        "validation_loss",
        "grad_norm",
        "num_tokens",
        "num_supervised_tokens",
        "tokens_per_second",
        "learning_rate",
        "epoch",
        "reward_mean",
        "reward_std",
        "kl",
        "entropy",
        "clip_share",
        "sampler_trainer_gap",
        "sampler_trainer_gap_max",
        "share_1",
        "share_2",
        "sampling_seconds",
        "grading_seconds",
        "training_seconds",
        "validation_reward",
        "made_up",
    ],
    1.5,
)
"""More than any method reports."""
FIGURES = TaskFigures(
    phase_seconds={**dict.fromkeys(PHASES, 2.0), "made up": 3.0}, peak_memory_bytes=1 << 30, device_use=0.5
)


def step(number: int, **values: float) -> list[Event]:
    progress = Progress(phase="training", completed=number, total=100, unit="steps", remaining_seconds=50.0)
    return [
        Event(step=number, metrics=MetricValues(values=values or EVERYTHING)),
        Event(step=number, progress=progress),
    ]


def of_job(number: int) -> Task:
    return replace(TASK, subject=f"projects/p/fineTuningJobs/j{number}")


class Board:
    """Series on a clock that is moved by hand."""

    def __init__(self, most: int = training.MOST_JOBS) -> None:
        self.now = 1000.0
        self.registry = CollectorRegistry()
        self.jobs = JobSeries(self.registry, most, lambda: self.now)

    def series(self, task: Task = TASK) -> dict[str, float]:
        """Values of a job's series by name, or by name and phase."""
        return {
            f"{sample.name} {sample.labels['phase']}"
            if "phase" in sample.labels
            else sample.name: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.labels.get("fine_tuning_job") == task.subject
        }


def test_a_step_is_shown_as_it_was_reported() -> None:
    board = Board()
    first = {"train_loss": 2.0, "num_tokens": 100.0, "num_supervised_tokens": 40.0, "tokens_per_second": 50.0}
    board.jobs.reported(TASK, step(1, **first), None)
    board.now += 7.0
    board.jobs.reported(TASK, step(2, **first | {"train_loss": 1.0, "grad_norm": 3.0}), FIGURES)
    shown = board.series()
    assert shown["luthier_training_step"] == 2.0
    assert shown["luthier_training_loss"] == 1.0
    assert shown["luthier_training_gradient_norm"] == 3.0
    assert shown["luthier_training_tokens_total"] == 200.0
    assert shown["luthier_training_supervised_tokens_total"] == 80.0
    assert shown["luthier_training_step_seconds"] == 2.0
    assert shown["luthier_training_last_step_timestamp_seconds"] == 1007.0
    assert shown["luthier_training_expected_end_timestamp_seconds"] == 1057.0
    assert shown["luthier_training_checkpoint_timestamp_seconds"] == 1000.0, "the first step"
    assert shown["luthier_training_phase_seconds_total compute"] == 2.0
    assert shown["luthier_training_memory_bytes"] == 1 << 30
    assert shown["luthier_training_device_use_ratio"] == 0.5
    assert "luthier_training_reward" not in shown
    board.jobs.checkpointed(TASK, CommitCheckpointRequest(step=2))
    assert board.series()["luthier_training_checkpoint_timestamp_seconds"] == 1007.0


def test_a_job_has_at_most_twenty_series_whatever_its_worker_says() -> None:
    board = Board()
    board.jobs.reported(TASK, step(1), FIGURES)
    both = board.series()
    assert len(both) == 20, sorted(both)
    board.jobs.ended(TASK, None)
    board.jobs.reported(
        TASK, step(1, **{name: 1.0 for name in EVERYTHING if name != "sampling_seconds"}), FIGURES
    )
    assert len(board.series()) == 18
    assert {name.partition(" ")[2] for name in both if "phase" in name} == set(PHASES) == set(training.PHASES)


def test_series_are_there_from_the_first_step_to_the_end_of_the_attempt() -> None:
    board = Board()
    loading = Progress(phase="loading model", unit="files")
    board.jobs.reported(TASK, [Event(progress=loading)], FIGURES)
    assert board.series() == {}
    failure = Failure(code="INTERNAL", reason="INTERNAL", message="m")
    ends = (None, Outcome(failure=failure), Outcome(cancelled=True), Outcome(result=TaskResult()))
    for end in ends:
        board.jobs.reported(TASK, step(1), None)
        assert board.series()
        board.jobs.ended(TASK, end)
        assert board.series() == {}


def test_other_tasks_have_none() -> None:
    board = Board()
    board.jobs.reported(replace(TASK, kind=TaskKind.REGISTER_MODEL), step(1), FIGURES)
    assert board.series() == {}


def test_a_flood_of_jobs_makes_no_more_series_than_the_limit() -> None:
    board = Board(most=10)
    for number in range(500):
        board.jobs.reported(of_job(number), step(1), FIGURES)
    assert board.registry.get_sample_value("luthier_training_jobs") == 10.0
    assert board.series(of_job(10)) == {}
    board.jobs.ended(of_job(0), None)
    board.jobs.reported(of_job(10), step(2), None)
    assert board.series(of_job(10))


def test_two_hundred_jobs_cost_a_tenth_of_a_second() -> None:
    board = Board()
    for number in range(200):
        board.jobs.reported(of_job(number), step(1), FIGURES)
    seconds = []
    for _ in range(7):
        began = time.thread_time()
        page = generate_latest(board.registry)
        seconds.append(time.thread_time() - began)
    assert page.count(b"fine_tuning_job=") > 200 * 18
    assert min(seconds) <= 0.1
