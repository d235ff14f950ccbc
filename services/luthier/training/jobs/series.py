"""Prometheus series of jobs that train: of each while it does, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.runtime.catalogue import training
from luthier.runtime.metric import Metric
from luthier.storage.database import Database
from luthier.training.jobs.handler import TRAINING_PHASE
from luthier.training.jobs.repository import Checkpoints
from luthier.v1.event_pb2 import Event
from luthier.work.log import EventLog
from luthier.work.repository import Tasks
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest, TaskFigures

_REPORTED: Mapping[str, Metric] = {"train_loss": training.LOSS, "grad_norm": training.GRADIENT_NORM}
"""Which metric of a step is shown as which."""
_TAUGHT: Mapping[str, Metric] = {**_REPORTED, "validation_loss": training.VALIDATION_LOSS}
_DRAWN: Mapping[str, Metric] = {
    **_REPORTED,
    "reward_mean": training.REWARD,
    "kl": training.KL,
    "sampler_trainer_gap": training.GAP,
}
_ADDED: Mapping[str, Metric] = {
    "num_tokens": training.TOKENS,
    "num_supervised_tokens": training.SUPERVISED_TOKENS,
}
_NEWEST_EVENTS = 500
"""Some 250 steps have no more: enough to say how far a job is, and how long its steps take."""
_OF_JOBS = tuple(
    metric
    for metric in vars(training).values()
    if isinstance(metric, Metric) and metric not in (training.JOBS, training.PHASE_SECONDS)
)


@dataclass(slots=True, eq=False)
class _Series:
    """What is shown of one job: a value of each metric that is known, and the seconds of each phase."""

    values: dict[Metric, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)


class JobSeries(Collector):
    """Shows jobs from what their workers report: an observer of tasks. At most `most` of them at a time.

    Told on the event loop, read from any thread.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        most: int = training.MOST_JOBS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._most = most
        self._clock = clock
        self._jobs: dict[str, _Series] = {}
        registry.register(self)

    def began(self, task: Task) -> None:
        """Show a job once a worker has it: one that hangs before its first step must be seen to stand still."""
        if task.kind is TaskKind.TRAIN:
            self._show(task)

    def resumed(self, task: Task, events: Sequence[Event], kept_at: float | None) -> None:
        """Show a job that a worker had before this process began, by the newest events of its log, in order.

        `kept_at` is what it has for the time of its last checkpoint, as far back as that is; None: nothing yet.

        A worker that hangs reports nothing any more: who waited for its next step would never say that it stands still.
        """
        series = self._show(task)
        if series is None:
            return
        if kept_at is not None:
            series.values[training.CHECKPOINT_TIME] = kept_at
        for event in events:
            if event.attempt == task.attempt:
                _take(series.values, event, _seconds(event.event_time))

    def reported(self, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        """Take in how far it is, and what its steps came to."""
        if task.kind is not TaskKind.TRAIN:
            return
        series = self._jobs.get(task.subject)
        # One that found no room when it began may have found some since.
        if series is None and any(event.HasField("metrics") for event in events):
            series = self._show(task)
        if series is None:
            return
        now = self._clock()
        for event in events:
            _take(series.values, event, now)
            _count(series.values, event.metrics.values)
        if figures is not None:
            _measure(series, figures)

    def checkpointed(self, task: Task, request: CommitCheckpointRequest) -> None:
        """Note when that was."""
        series = self._jobs.get(task.subject)
        if series is not None:
            series.values[training.CHECKPOINT_TIME] = self._clock()

    def ended(self, task: Task, outcome: Outcome | None) -> None:
        """Forget a job that trains no more, or begins again."""
        self._jobs.pop(task.subject, None)

    def describe(self) -> Iterator[Family]:
        """Yield what `collect` does, without series."""
        return (metric.family() for metric in (training.JOBS, *_OF_JOBS, training.PHASE_SECONDS))

    def collect(self) -> Iterator[Family]:
        """Yield all that is known."""
        # In one step of the interpreter each: the event loop changes both meanwhile.
        jobs = [(job, dict(one.values), dict(one.phases)) for job, one in list(self._jobs.items())]
        number = training.JOBS.family()
        number.add_metric((), len(jobs))
        yield number
        for metric in _OF_JOBS:
            family = metric.family()
            for job, values, _ in jobs:
                if metric in values:
                    family.add_metric((job,), values[metric])
            yield family
        family = training.PHASE_SECONDS.family()
        for job, _, phases in jobs:
            for phase, seconds in phases.items():
                family.add_metric((job, phase), seconds)
        yield family

    def _show(self, task: Task) -> _Series | None:
        """Begin to show a job that has moved just now; None: there is no room."""
        if task.subject not in self._jobs and len(self._jobs) >= self._most:
            return None
        series = self._jobs[task.subject] = _Series(values={training.LAST_STEP: self._clock()})
        return series


async def show_running(database: Database, log: EventLog, series: JobSeries) -> None:
    """Show the jobs that workers have already: this process begins, and has heard nothing of them."""
    async with database.reading() as connection:
        for task in await Tasks().leased(connection):
            if task.kind is TaskKind.TRAIN:
                newest = await log.newest(connection, task.uid, _NEWEST_EVENTS)
                series.resumed(task, newest, await _kept_at(connection, log, task))


async def _kept_at(connection: AsyncConnection, log: EventLog, task: Task) -> float | None:
    """Return when an attempt committed its last checkpoint, before the first when its first step was reported.

    The newest events do not say it: they are those of the last minutes where steps are quick.
    """
    latest = await Checkpoints().latest(connection, task.uid)
    if latest is not None and latest.message.attempt == task.attempt:
        return _seconds(latest.message.create_time)
    sequence = await log.first_of(connection, task.uid, task.attempt)
    while events := await log.read(connection, task.uid, sequence, _NEWEST_EVENTS):
        for event in events:
            if event.attempt == task.attempt and event.HasField("metrics"):
                return _seconds(event.event_time)
        sequence = events[-1].sequence + 1
    return None


def _seconds(at: Timestamp) -> float:
    return at.ToMicroseconds() / 1e6


def _take(shown: dict[Metric, float], event: Event, at: float) -> None:
    """Take in what happened to a job at a time."""
    match event.WhichOneof("payload"):
        case "metrics":
            _step(shown, event, at)
        case "checkpoint":
            shown[training.CHECKPOINT_TIME] = at
        case "attempt_change":
            shown[training.LAST_STEP] = at
        case "progress":
            if training.STEP not in shown:
                shown[training.LAST_STEP] = at
            elif event.progress.phase == TRAINING_PHASE:
                shown[training.EXPECTED_END] = at + event.progress.remaining_seconds
        case _:
            pass


def _step(shown: dict[Metric, float], event: Event, at: float) -> None:
    told = event.metrics.values
    shown.setdefault(training.CHECKPOINT_TIME, at)
    shown[training.STEP], shown[training.LAST_STEP] = event.step, at
    # Reinforcement alone draws; it validates by reward, and has no other loss.
    for name, metric in (_DRAWN if "sampling_seconds" in told else _TAUGHT).items():
        if name in told:
            shown[metric] = told[name]
    speed = told.get("tokens_per_second", 0.0)
    if speed > 0:
        shown[training.STEP_SECONDS] = told.get("num_tokens", 0.0) / speed


def _count(shown: dict[Metric, float], told: Mapping[str, float]) -> None:
    """Add what a step learnt to what this process has seen."""
    if told:
        for name, metric in _ADDED.items():
            shown[metric] = shown.get(metric, 0.0) + told.get(name, 0.0)


def _measure(series: _Series, figures: TaskFigures) -> None:
    for phase in training.PHASES:
        if phase in figures.phase_seconds:
            series.phases[phase] = figures.phase_seconds[phase]
    if figures.peak_memory_bytes:
        series.values[training.MEMORY] = figures.peak_memory_bytes
    if figures.device_use:
        series.values[training.DEVICE_USE] = figures.device_use
