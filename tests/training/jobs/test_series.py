"""Series of jobs: there while a job trains, at most 20 each, quick to form, and gone when it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import exposition
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.training.conftest import Bench, stored

from luthier.errors import Failure
from luthier.runtime.catalogue import training
from luthier.storage.opening import open_stores
from luthier.training.__main__ import build, settings_of
from luthier.training.config import Config
from luthier.training.jobs.repository import Checkpoints
from luthier.training.jobs.series import _NEWEST_EVENTS, JobSeries, show_running
from luthier.training.recipes.phases import PHASES
from luthier.v1.event_pb2 import Event, MetricValues, Progress
from luthier.work.host import Hosted, Parts, hosting
from luthier.work.repository import Tasks
from luthier.work.tasks import NewTask, Outcome, Task, TaskKind, TaskState
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
PAGE_SECONDS = 0.1
"""What a page may take, of a core to itself."""
FIGURES = TaskFigures(
    phase_seconds={**dict.fromkeys(PHASES, 2.0), "made up": 3.0}, peak_memory_bytes=1 << 30, device_use=0.5
)


def step(number: int, **values: float) -> list[Event]:
    progress = Progress(phase="training", completed=number, total=100, unit="steps", remaining_seconds=50.0)
    return [
        Event(step=number, metrics=MetricValues(values=values or EVERYTHING)),
        Event(step=number, progress=progress),
    ]


def of_attempt(task: Task, events: list[Event]) -> list[Event]:
    """Events as the service keeps them of a task's attempt."""
    for event in events:
        event.attempt = task.attempt
    return events


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


def test_series_are_there_from_the_claim_to_the_end_of_the_attempt() -> None:
    board = Board()
    board.jobs.began(TASK)
    assert board.series() == {"luthier_training_last_step_timestamp_seconds": 1000.0}
    board.now += 5.0
    loading = Progress(phase="loading model", unit="files")
    board.jobs.reported(TASK, [Event(progress=loading)], FIGURES)
    shown = board.series()
    assert shown["luthier_training_last_step_timestamp_seconds"] == 1005.0, "its preparations go on"
    assert shown["luthier_training_memory_bytes"] == 1 << 30
    assert "luthier_training_checkpoint_timestamp_seconds" not in shown, "nothing is to be lost yet"
    assert "luthier_training_expected_end_timestamp_seconds" not in shown
    board.now += 5.0
    board.jobs.reported(TASK, step(1, train_loss=1.0), None)
    board.now += 5.0
    validating = Progress(phase="validating", unit="rows")
    board.jobs.reported(TASK, [Event(progress=validating)], None)
    assert board.series()["luthier_training_last_step_timestamp_seconds"] == 1010.0, "that is no step"
    failure = Failure(code="INTERNAL", reason="INTERNAL", message="m")
    ends = (None, Outcome(failure=failure), Outcome(cancelled=True), Outcome(result=TaskResult()))
    for end in ends:
        board.jobs.began(TASK)
        assert "luthier_training_step" not in board.series()
        board.jobs.reported(TASK, step(1), None)
        assert board.series()["luthier_training_step"] == 1.0
        board.jobs.ended(TASK, end)
        assert board.series() == {}


def test_other_tasks_have_none() -> None:
    board = Board()
    board.jobs.began(replace(TASK, kind=TaskKind.REGISTER_MODEL))
    board.jobs.reported(replace(TASK, kind=TaskKind.REGISTER_MODEL), step(1), FIGURES)
    assert board.series() == {}


def test_a_flood_of_jobs_makes_no_more_series_than_the_limit() -> None:
    board = Board(most=10)
    for number in range(500):
        board.jobs.began(of_job(number))
        board.jobs.reported(of_job(number), step(1), FIGURES)
    assert board.registry.get_sample_value("luthier_training_jobs") == 10.0
    assert board.series(of_job(10)) == {}
    board.jobs.ended(of_job(0), None)
    board.jobs.reported(of_job(10), step(2), None)
    assert board.series(of_job(10))


async def running(bench: Bench, name: str) -> Task:
    """Create a job that a worker is given."""
    await bench.create(name)
    return (await bench.claim())[0]


async def resumed(bench: Bench) -> Board:
    """What a service shows of the jobs of a bench when it begins."""
    board = Board()
    await show_running(bench.database, bench.log, board.jobs)
    return board


async def test_a_job_that_trains_is_shown_when_a_service_begins_again(bench: Bench) -> None:
    task = await running(bench, "one")
    steps = [event for number in (1, 2) for event in step(number, num_tokens=60.0, tokens_per_second=20.0)]
    await bench.queue.report(task.task_id, task.epoch, list(enumerate(of_attempt(task, steps), 1)), None)
    file = await stored(bench, "checkpoint")
    request = CommitCheckpointRequest(task=task.task_id, epoch=task.epoch, step=2, files=[file])
    await bench.queue.commit_checkpoint(request)
    async with bench.database.reading() as connection:
        told = await bench.log.read(connection, task.uid, 1, 100)
    at = {one.WhichOneof("payload"): one.event_time.ToMicroseconds() / 1e6 for one in told}
    shown = (await resumed(bench)).series(task)
    assert shown["luthier_training_last_step_timestamp_seconds"] == at["metrics"]
    assert shown["luthier_training_checkpoint_timestamp_seconds"] == at["checkpoint"]
    assert shown["luthier_training_expected_end_timestamp_seconds"] == at["progress"] + 50.0
    assert shown["luthier_training_step"] == 2.0
    assert shown["luthier_training_step_seconds"] == 3.0, "without it slow steps would be late"
    assert "luthier_training_tokens_total" not in shown, "a counter begins anew"


async def test_a_job_that_hangs_before_its_first_step_is_shown_when_a_service_begins_again(
    bench: Bench,
) -> None:
    task = await running(bench, "one")
    shown = (await resumed(bench)).series(task)
    assert shown.keys() == {"luthier_training_last_step_timestamp_seconds"}
    started = (await bench.job(task.subject)).start_time.ToMicroseconds() / 1e6
    assert abs(shown["luthier_training_last_step_timestamp_seconds"] - started) < 5.0


async def test_what_an_attempt_before_reported_is_not_shown_of_the_next(bench: Bench) -> None:
    first = await running(bench, "one")
    await bench.queue.report(
        first.task_id, first.epoch, list(enumerate(of_attempt(first, step(7)[:1]), 1)), None
    )
    await bench.queue.release_worker("worker", "2")
    second = (await bench.claim())[0]
    assert second.attempt == 2
    assert "luthier_training_step" not in (await resumed(bench)).series(second)


async def test_a_job_that_no_worker_has_is_not_shown_when_a_service_begins_again(bench: Bench) -> None:
    await running(bench, "one")
    await bench.queue.release_worker("worker", "2")
    await bench.create("two")
    board = await resumed(bench)
    assert board.registry.get_sample_value("luthier_training_jobs") == 0.0


async def told(bench: Bench, task: Task, events: list[Event], first_number: int) -> None:
    """Report events of a task's attempt, from a local number on."""
    for begin in range(0, len(events), 200):
        numbered = enumerate(of_attempt(task, events[begin : begin + 200]), first_number + begin)
        await bench.queue.report(task.task_id, task.epoch, list(numbered), None)


def quick_steps(count: int) -> list[Event]:
    return [step(number, train_loss=1.0)[0] for number in range(1, count + 1)]


async def whole_log(bench: Bench, task: Task) -> list[Event]:
    async with bench.database.reading() as connection:
        return await bench.log.newest(connection, task.uid, 10_000)


def seconds_of(event: Event) -> float:
    return event.event_time.ToMicroseconds() / 1e6


async def test_a_checkpoint_of_long_ago_stays_as_old_when_a_service_begins_again(bench: Bench) -> None:
    """Of quick steps the newest events are those of the last minutes."""
    task = await running(bench, "one")
    await told(bench, task, quick_steps(2), 1)
    file = await stored(bench, "checkpoint")
    request = CommitCheckpointRequest(task=task.task_id, epoch=task.epoch, step=2, files=[file])
    await bench.queue.commit_checkpoint(request)
    await told(bench, task, quick_steps(700), 3)
    everything = await whole_log(bench, task)
    (committed,) = [event for event in everything if event.HasField("checkpoint")]
    assert committed not in everything[-_NEWEST_EVENTS:]
    async with bench.database.reading() as connection:
        latest = await Checkpoints().latest(connection, task.uid)
    assert latest is not None
    shown = (await resumed(bench)).series(task)["luthier_training_checkpoint_timestamp_seconds"]
    assert shown == latest.message.create_time.ToMicroseconds() / 1e6
    assert shown <= seconds_of(committed) < seconds_of(everything[-_NEWEST_EVENTS])


async def test_without_a_checkpoint_the_first_step_of_the_attempt_counts_however_long_ago(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await running(bench, "one")
    await told(bench, first, quick_steps(900), 1)
    file = await stored(bench, "checkpoint")
    request = CommitCheckpointRequest(task=first.task_id, epoch=first.epoch, step=900, files=[file])
    await bench.queue.commit_checkpoint(request)
    await bench.queue.release_worker("worker", "2")
    second = (await bench.claim())[0]
    # Longer than what is read at once.
    loading = [
        Event(progress=Progress(phase="loading model", completed=number, unit="files"))
        for number in range(_NEWEST_EVENTS + 50)
    ]
    await told(bench, second, loading, 1)
    name = "luthier_training_checkpoint_timestamp_seconds"
    assert name not in (await resumed(bench)).series(second), "nothing of this attempt is to be lost yet"
    await told(bench, second, [step(901, train_loss=1.0)[0]], len(loading) + 1)
    await told(bench, second, quick_steps(700), len(loading) + 2)
    everything = await whole_log(bench, second)
    steps = [event for event in everything if event.attempt == 2 and event.HasField("metrics")]
    num_read, read = 0, bench.log.read

    async def counted(connection: AsyncConnection, uid: str, begin: int, limit: int) -> list[Event]:
        nonlocal num_read
        found = await read(connection, uid, begin, limit)
        num_read += len(found)
        return found

    monkeypatch.setattr(bench.log, "read", counted)
    assert (await resumed(bench)).series(second)[name] == seconds_of(steps[0])
    assert seconds_of(steps[0]) < seconds_of(everything[-_NEWEST_EVENTS])
    assert num_read < 4 * _NEWEST_EVENTS < len(everything), "a long log is not read whole"


@asynccontextmanager
async def hosted(home: Path) -> AsyncIterator[Parts]:
    """The service as its process runs it."""
    config = Config(
        home=home,
        log_level="INFO",
        projects=("default",),
        data_address="127.0.0.1:1",
        training_address="127.0.0.1:0",
        reward_addresses=(),
        metrics_address="127.0.0.1:0",
    )
    made: list[Parts] = []

    def kept(parts: Parts) -> Hosted:
        made.append(parts)
        return build(parts, config)

    async with hosting(settings_of(config), kept, open_stores):
        yield made[0]


async def test_the_service_shows_at_once_what_trains_already(tmp_path: Path) -> None:
    async with hosted(tmp_path) as parts, parts.database.transaction() as connection:
        new = NewTask(kind=TaskKind.TRAIN, uid="u", subject=TASK.subject, project="p", resources=())
        task = await Tasks().add(connection, new)
        changes = {"state": TaskState.LEASED, "attempt": 1, "epoch": 1, "worker": "w@1"}
        await Tasks().change(connection, task.task_id, **changes)
        event = step(3, train_loss=1.0)[0]
        event.attempt = 1
        await parts.log.append(connection, "u", [event])
    async with hosted(tmp_path) as parts:
        shown = parts.metrics.registry.get_sample_value(training.STEP.name, {"fine_tuning_job": TASK.subject})
        assert shown == 3.0


async def test_a_page_with_two_hundred_jobs_costs_a_tenth_of_a_second(tmp_path: Path) -> None:
    async with hosted(tmp_path) as parts:
        for number in range(200):
            parts.work_metrics.reported(of_job(number), step(1), FIGURES)
        await parts.figures.look()
        # A thread takes longer while others have the other half of its core: then it is measured again, a while later.
        for _ in range(30):
            seconds = []
            for _ in range(7):
                began = time.thread_time()
                page = exposition.generate_latest(parts.metrics.registry)  # type: ignore[no-untyped-call]
                seconds.append(time.thread_time() - began)
            if min(seconds) <= PAGE_SECONDS:
                break
            await asyncio.sleep(1)
    assert page.endswith(b"# EOF\n")
    assert page.count(b"fine_tuning_job=") > 200 * 18
    assert min(seconds) <= PAGE_SECONDS
