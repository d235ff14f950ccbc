"""What a training measures of itself is told now and then, and costs a step nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.worker.conftest import Site

from luthier.runtime.catalogue import training
from luthier.training.jobs.series import JobSeries
from luthier.training.recipes.phases import PhaseClock
from luthier.training.worker import measuring as measuring_module
from luthier.training.worker.measuring import Measuring
from luthier.v1.event_pb2 import Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.context import TaskContext
from luthier.work.tasks import Task
from luthier.worker.v1.worker_service_pb2 import TaskFigures


class Desk:
    def __init__(self) -> None:
        self.told: list[TaskFigures] = []
        self.measured = self.told.append


def measuring(desk: Any) -> tuple[Measuring, PhaseClock]:
    clock = PhaseClock()
    return Measuring(desk, clock, torch.device("cpu")), clock


def test_figures_say_where_time_went_what_is_held_and_how_busy_it_was() -> None:
    desk = Desk()
    made, clock = measuring(desk)
    clock.enter("compute")
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    made.tell()
    (figures,) = desk.told
    assert set(figures.phase_seconds) == {"compute"}
    assert figures.phase_seconds["compute"] >= 0.05
    assert figures.peak_memory_bytes > 100 << 20, "torch alone takes more"
    assert 0.0 < figures.device_use <= 1.0


def test_idle_time_is_no_use_of_the_device() -> None:
    desk = Desk()
    made, _ = measuring(desk)
    made.tell()
    time.sleep(0.2)
    made._told_at = float("-inf")
    made.tell()
    assert desk.told[1].device_use < 0.5


def test_steps_that_are_quick_tell_once_a_second() -> None:
    desk = Desk()
    made, _ = measuring(desk)
    began = time.perf_counter()
    for _ in range(10_000):
        made.tell()
    seconds = time.perf_counter() - began
    assert len(desk.told) <= 1 + seconds
    assert seconds / 10_000 < 1e-4


async def test_a_job_shows_what_its_checkpoints_take_of_its_time(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, float] = {}
    reported, begin = JobSeries.reported, TaskContext.begin_checkpoint

    def noted(series: JobSeries, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        reported(series, task, events, figures)
        for family in series.collect():
            for sample in family.samples:
                if sample.name == training.PHASE_SECONDS.name:
                    shown[sample.labels["phase"]] = sample.value

    def slow(context: TaskContext, *arguments: Any) -> None:
        time.sleep(0.5)
        begin(context, *arguments)

    monkeypatch.setattr(measuring_module, "_APART_SECONDS", 0.0)
    monkeypatch.setattr(JobSeries, "reported", noted)
    monkeypatch.setattr(TaskContext, "begin_checkpoint", slow)
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        job = await site.ended((await site.create("one", max_steps=5)).name)
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert set(shown) == {"data", "compute", "validation", "checkpoint", "waiting"}
    assert shown["checkpoint"] >= 0.5, "one was due before the last step"
    assert shown["checkpoint"] > shown["waiting"]
