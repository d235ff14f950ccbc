"""Who works: a process keeps its id for as long as it is heard of, or holds its lock."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from tests.work.conftest import Clock

from luthier.errors import AlreadyExists, FailedPrecondition
from luthier.work.metrics import WorkMetrics
from luthier.work.tasks import TaskKind
from luthier.work.workers import Worker, Workers, holder_parts


class Desk:
    """Workers on a clock that is moved by hand."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.workers = Workers(WorkMetrics(self.registry, (TaskKind.TRAIN,)), 30.0, self.clock)

    def register(self, instance: str, lock: str = "", leases: dict[str, float] | None = None) -> Worker:
        worker = Worker(worker_id="w", instance=instance, kinds=(TaskKind.TRAIN,), lock=lock)
        self.workers.register(worker, leases)
        return worker

    def shown(self) -> float | None:
        self.workers.show()
        return self.registry.get_sample_value("luthier_workers")


def test_a_second_process_of_an_id_is_refused_while_the_first_is_heard_of() -> None:
    desk = Desk()
    first = desk.register("1")
    desk.clock.now += 29.0
    with pytest.raises(AlreadyExists, match="another process works as 'w'") as caught:
        desk.register("2")
    assert caught.value.reason == "WORKER_ID_TAKEN"
    assert caught.value.retry_after_seconds == pytest.approx(1.0)
    assert desk.workers.known("w", "1") == first
    desk.register("1")  # the same process may say so again


def test_a_process_that_was_silent_for_a_period_loses_its_place() -> None:
    desk = Desk()
    desk.register("1")
    desk.clock.now += 31.0
    desk.register("2")
    assert desk.workers.known("w", "2").instance == "2"
    with pytest.raises(FailedPrecondition, match="registered by another process"):
        desk.workers.known("w", "1")
    desk.clock.now += 20.0
    desk.workers.heard("w@1")
    desk.clock.now += 20.0
    assert desk.shown() == 0, "the former process does not count for the new one"


def test_the_same_lock_in_other_hands_proves_that_the_former_process_ended() -> None:
    desk = Desk()
    desk.register("1", lock="a")
    with pytest.raises(AlreadyExists):
        desk.register("2", lock="b")
    with pytest.raises(AlreadyExists):
        desk.register("2")
    assert desk.register("2", lock="a").holder == "w@a/2"
    assert desk.workers.known("w", "2")


def test_after_a_restart_of_the_service_live_leases_keep_an_id() -> None:
    for holder, lock in (("w@1", "a"), ("w@b/1", "a"), ("w@b/1", "")):
        with pytest.raises(AlreadyExists):
            Desk().register("2", lock=lock, leases={holder: 12.0})
    Desk().register("2", lock="a", leases={"w@a/1": 12.0})
    Desk().register("1", lock="a", leases={"w@a/1": 12.0})
    Desk().register("2", lock="a", leases={"w@b/1": 0.0})


def test_the_metric_falls_when_a_worker_is_silent() -> None:
    desk = Desk()
    worker = desk.register("1")
    assert desk.shown() == 1
    desk.clock.now += 31.0
    assert desk.shown() == 0
    with desk.workers.waiting(worker):
        desk.clock.now += 31.0
        assert desk.shown() == 1, "it waits for a task"
    desk.clock.now += 20.0
    desk.workers.excuse()
    desk.clock.now += 20.0
    assert desk.shown() == 1, "the silence was the service's own"


def test_a_holder_is_taken_apart_as_it_was_made() -> None:
    worker = Worker(worker_id="training-a", instance="i1", kinds=(), lock="l:2")
    assert holder_parts(worker.holder) == ("training-a", "l:2", "i1")
    assert holder_parts("training@i1") == ("training", "", "i1"), "as rows of older releases say it"
    assert holder_parts("") == ("", "", "")


def test_workers_that_are_heard_of_are_present() -> None:
    desk = Desk()
    worker = desk.register("1")
    assert desk.workers.present() == [worker]
    desk.clock.now += 31.0
    assert desk.workers.present() == []
    with desk.workers.waiting(worker):
        desk.clock.now += 31.0
        assert desk.workers.present() == [worker]
