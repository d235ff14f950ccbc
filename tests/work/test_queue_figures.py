"""What /metrics says of a queue: since when tasks wait and why, who is there, and never too many series."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import update
from tests.work.conftest import Bench, new_task

from luthier.errors import Failure
from luthier.runtime.catalogue import queue, workers
from luthier.runtime.metric import NONE, OTHER
from luthier.work.limits import kinds_with_room
from luthier.work.metrics import WorkMetrics, fault_of
from luthier.work.queue_figures import REASONS, QueueFigures
from luthier.work.repository import Tasks
from luthier.work.requirements import Equipment, Requirements
from luthier.work.schema import tasks
from luthier.work.tasks import Outcome, TaskKind
from luthier.work.workers import Worker, Workers
from luthier.worker.v1.worker_service_pb2 import WorkerFigures


def worker(name: str, *kinds: TaskKind) -> Worker:
    return Worker(
        worker_id=name,
        instance="1",
        kinds=kinds or (TaskKind.TRAIN,),
        equipment=Equipment(device="CPU", device_name="Some CPU", num_devices=1, memory_bytes=1 << 30),
        version="1.2.3",
    )


def present(bench: Bench, *names: str) -> Workers:
    made = Workers(bench.queue.metrics)
    for name in names:
        made.register(worker(name))
    return made


def series(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by its labels, in the order of their names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def why(bench: Bench) -> dict[str, float]:
    """How many tasks wait for which reason, those for which some do."""
    found = series(bench.registry, queue.WAITING.name)
    return {reason: value for (_, reason), value in found.items() if value}


async def test_a_task_waits_for_a_worker_of_its_kind(bench: Bench) -> None:
    await bench.enqueue()
    await bench.look()
    assert why(bench) == {"NO_WORKER": 1.0}
    assert set(series(bench.registry, queue.WAITING.name)) == {("TRAIN", reason) for reason in REASONS}


async def test_a_task_waits_for_a_worker_with_what_it_requires(bench: Bench) -> None:
    await bench.enqueue(required=Requirements(device="CUDA"))
    await bench.look(present(bench, "w"))
    assert why(bench) == {"NO_FITTING_WORKER": 1.0}


async def test_a_task_waits_for_a_worker_with_as_many_ranks(bench: Bench) -> None:
    await bench.enqueue(required=Requirements(num_ranks=4))
    await bench.look(present(bench, "w"))
    assert why(bench) == {"NO_FITTING_WORKER": 1.0}


async def test_a_task_waits_its_turn_or_for_workers_that_are_busy(bench: Bench) -> None:
    there = present(bench, "w")
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    await bench.look(there)
    assert why(bench) == {"TURN": 2.0}
    await bench.claim("w@1")
    await bench.look(there)
    assert why(bench) == {"BUSY": 1.0}


async def test_what_a_worker_does_of_another_kind_keeps_nothing_waiting(bench: Bench) -> None:
    registry = CollectorRegistry()
    metrics = WorkMetrics(registry, (TaskKind.TRAIN, TaskKind.REGISTER_MODEL))
    there = Workers(metrics)
    there.register(worker("w", TaskKind.TRAIN, TaskKind.REGISTER_MODEL))
    await bench.enqueue("jobs/long")
    await bench.claim("w@1")
    async with bench.database.transaction() as connection:
        await bench.queue.enqueue(connection, new_task("models/m", kind=TaskKind.REGISTER_MODEL))
    await bench.enqueue("jobs/next")
    await QueueFigures(bench.database, there, metrics).look()
    waiting = series(registry, queue.WAITING.name)
    assert {key for key, value in waiting.items() if value} == {("REGISTER_MODEL", "TURN"), ("TRAIN", "BUSY")}
    assert series(registry, workers.IDLE.name) == {("REGISTER_MODEL",): 1.0, ("TRAIN",): 0.0}
    told = series(registry, workers.INFO.name)
    assert set(told) == {("CPU", "Some CPU", "REGISTER_MODEL,TRAIN", "1.2.3", "w")}


@pytest.mark.parametrize(
    ("held", "free"),
    [
        ((), ("REGISTER_MODEL", "EVALUATE", "ANSWER_SHARE")),
        (("REGISTER_MODEL", "TRAIN"), ("REGISTER_MODEL", "EVALUATE", "ANSWER_SHARE")),
        (("REGISTER_MODEL", "REGISTER_MODEL"), ("EVALUATE", "ANSWER_SHARE")),
        (("ANSWER_SHARE",), ("REGISTER_MODEL",)),
        (("EVALUATE",), ("REGISTER_MODEL",)),
    ],
)
def test_kinds_with_room_counts_what_shares_slots(held: tuple[str, ...], free: tuple[str, ...]) -> None:
    kinds = (TaskKind.REGISTER_MODEL, TaskKind.EVALUATE, TaskKind.ANSWER_SHARE)
    assert kinds_with_room(kinds, [TaskKind(one) for one in held]) == tuple(TaskKind(one) for one in free)


async def test_a_task_that_is_put_off_says_so(bench: Bench) -> None:
    task = await bench.enqueue()
    async with bench.database.transaction() as connection:
        await Tasks().put_off(connection, task.task_id, 600.0)
    await bench.look(present(bench, "w"))
    assert why(bench) == {"PUT_OFF": 1.0}


async def test_a_task_waits_for_room_on_the_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.enqueue()
    monkeypatch.setattr(bench.database.disk, "has_room", lambda: False)
    await bench.look(present(bench, "w"))
    assert why(bench) == {"DISK_FULL": 1.0}


async def test_projects_that_wait_are_told_apart_up_to_a_limit(bench: Bench) -> None:
    for number in range(queue.MOST_PROJECTS + 30):
        await bench.enqueue(f"jobs/{number}", project=f"p{number}")
    await bench.look()
    shown = series(bench.registry, queue.OLDEST.name)
    assert len(shown) == queue.MOST_PROJECTS + 1
    assert ("TRAIN", "p0") in shown, "it has waited longest"
    assert shown["TRAIN", OTHER] <= shown["TRAIN", "p0"]


async def test_nothing_is_shown_of_a_project_whose_tasks_are_gone(bench: Bench) -> None:
    await bench.enqueue()
    await bench.look()
    assert set(series(bench.registry, queue.OLDEST.name)) == {("TRAIN", "p")}
    await bench.claim()
    await bench.look()
    assert series(bench.registry, queue.OLDEST.name) == {}


async def test_what_closes_some_work_has_its_turn_and_waits_since_it_was_queued_itself(bench: Bench) -> None:
    await queue_share(bench, "jobs/a", 1)
    async with bench.database.transaction() as connection:
        hour_us = 3600 * 1_000_000
        ago = {"queued_at_us": tasks.c.queued_at_us - hour_us, "turn_at_us": tasks.c.turn_at_us - hour_us}
        await connection.execute(update(tasks).values(ago))
    await bench.claim()
    await bench.enqueue("jobs/b")
    await queue_share(bench, "jobs/a", 0)
    waited = sum(series(bench.registry, f"{queue.QUEUE_WAIT.name}_sum").values())
    assert waited > 3600
    await bench.look()
    assert max(series(bench.registry, queue.OLDEST.name).values()) < 60
    closing = await bench.claim()
    assert closing is not None
    assert (closing.subject, closing.share) == ("jobs/a", 0), "jobs/b came later than its first share"
    assert sum(series(bench.registry, f"{queue.QUEUE_WAIT.name}_sum").values()) < waited + 60


async def queue_share(bench: Bench, subject: str, share: int) -> None:
    async with bench.database.transaction() as connection:
        await bench.queue.enqueue(connection, replace(new_task(subject), share=share))


async def test_workers_are_shown_with_what_they_have_and_say(bench: Bench) -> None:
    there = present(bench, "a", "b")
    figures = WorkerFigures(
        resident_bytes=5,
        available_bytes=6,
        num_children=1,
        num_child_starts=7,
        num_child_failures={"CRASHED": 2, "X": 9},
    )
    there.measured("a@1", figures)
    there.measured("b@2", figures)  # another process of that id
    await bench.enqueue()
    await bench.claim("a@1")
    await bench.look(there)
    registry = bench.registry
    assert series(registry, workers.ABLE.name) == {("TRAIN",): 2.0}
    assert series(registry, workers.IDLE.name) == {("TRAIN",): 1.0}
    assert series(registry, workers.TASKS.name) == {("a",): 1.0, ("b",): 0.0}
    assert series(registry, workers.INFO.name) == {
        ("CPU", "Some CPU", "TRAIN", "1.2.3", "a"): 1.0,
        ("CPU", "Some CPU", "TRAIN", "1.2.3", "b"): 1.0,
    }
    assert series(registry, workers.RESIDENT.name) == {("a",): 5.0}
    assert series(registry, workers.CHILD_STARTS.name) == {("a",): 7.0}
    failures = series(registry, workers.CHILD_ENDS.name)
    assert failures == {("CRASHED", "a"): 2.0} | {
        (one, "a"): 0.0 for one in ("STALLED", "OUT_OF_MEMORY", "NURSERY")
    }


async def test_figures_of_a_process_go_with_it(bench: Bench) -> None:
    there = present(bench, "a")
    there.measured("a@1", WorkerFigures(resident_bytes=5))
    made = worker("a")
    there._heard["a"] -= 100.0
    there.register(Worker(worker_id="a", instance="2", kinds=made.kinds, equipment=made.equipment))
    assert there.figures("a") is None


async def test_a_flood_of_workers_makes_few_series(bench: Bench) -> None:
    there = present(bench, *(f"w{number:04}" for number in range(workers.MOST_WORKERS + 50)))
    await bench.look(there)
    assert len(series(bench.registry, workers.INFO.name)) == workers.MOST_WORKERS
    assert series(bench.registry, workers.ABLE.name) == {("TRAIN",): workers.MOST_WORKERS + 50}


async def test_attempts_and_ends_are_counted_with_their_reasons(bench: Bench) -> None:
    for number, reason in enumerate(
        ["LOSS_NOT_FINITE", "INTERNAL", *(f"MADE_UP_{one}" for one in range(40))]
    ):
        await bench.enqueue(f"jobs/{number}")
        task = await bench.claim()
        assert task is not None
        failure = Failure(code="FAILED_PRECONDITION", reason=reason, message="m")
        await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
        await bench.queue.finish(
            task.task_id, task.epoch, Outcome(failure=failure)
        )  # said twice, counted once
    attempts = {key: value for key, value in series(bench.registry, queue.ATTEMPTS.name).items() if value}
    assert attempts == {
        ("TRAIN", "failed", "LOSS_NOT_FINITE"): 1.0,
        ("TRAIN", "failed", "INTERNAL"): 1.0,
        ("TRAIN", "failed", OTHER): 40.0,
    }
    ends = {key: value for key, value in series(bench.registry, queue.ENDED.name).items() if value}
    assert ends == {
        ("request", "TRAIN", "failed", "LOSS_NOT_FINITE"): 1.0,
        ("service", "TRAIN", "failed", "INTERNAL"): 1.0,
        ("request", "TRAIN", "failed", OTHER): 40.0,
    }


async def test_a_lost_attempt_is_counted_once_it_is_stored(bench: Bench) -> None:
    await bench.enqueue()
    await bench.claim("w@1")
    await bench.queue.release_worker("w", "2")
    assert series(bench.registry, queue.ATTEMPTS.name)["TRAIN", "lost", "WORKER_LOST"] == 1.0
    assert not any(value for value in series(bench.registry, queue.ENDED.name).values())


def test_whose_fault_a_failure_is() -> None:
    def failed(reason: str) -> str:
        return fault_of(Failure(code="INTERNAL", reason=reason, message="m"))

    assert (fault_of(None), failed("CRASHED"), failed("OUT_OF_MEMORY")) == (NONE, "service", "request")
