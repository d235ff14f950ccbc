"""What a worker measures of itself, and how it comes to its service: with calls that it makes anyway."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.work.hosted import serve
from tests.work.test_queue_figures import series

from luthier.runtime.catalogue import workers
from luthier.work.context import TaskContext
from luthier.work.worker_figures import ChildCounts, Measured, family_of, resident_bytes
from luthier.worker.v1.task_pb2 import TaskResult, TrainResult
from luthier.worker.v1.worker_service_pb2 import TaskFigures


def test_children_are_counted_and_only_their_own_failures() -> None:
    counts = ChildCounts()
    for reason in ("CRASHED", "OUT_OF_MEMORY", "LOSS_NOT_FINITE", "CRASHED"):
        counts.began()
        counts.failed(reason)
        counts.ended()
    counts.began()
    assert (counts.num_starts, counts.num_running) == (5, 1)
    assert counts.failures == {"CRASHED": 2, "OUT_OF_MEMORY": 1}


def test_figures_are_measured_again_when_they_are_old() -> None:
    counts = ChildCounts()
    counts.began()
    measured = Measured(counts)
    figures = measured()
    assert figures is not None
    assert figures.num_child_starts == figures.num_children == 1
    assert resident_bytes(os.getpid()) * 0.5 < figures.resident_bytes
    assert figures.available_bytes > 0
    assert measured() is None, "a heartbeat a moment later has nothing new"
    measured._at -= 100.0
    assert measured() is not None


def test_the_family_of_a_process_is_all_that_it_has_started() -> None:
    code = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert {os.getpid(), child.pid, grandchild} <= set(family_of(os.getpid()))
        os.kill(grandchild, 9)
        child.communicate("")
    assert resident_bytes(child.pid) == 0


def test_a_process_that_ends_while_its_family_is_looked_for_is_nobodys_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is seen among its parent's children, and is gone when its own are asked for."""
    with subprocess.Popen(["sleep", "60"]) as child:
        for name in ("scandir", "listdir"):
            really = getattr(os, name)

            def gone(path: object, really: Callable[[object], object] = really) -> object:
                if str(path) == f"/proc/{child.pid}/task":
                    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), str(path))
                return really(path)

            monkeypatch.setattr(os, name, gone)
        assert child.pid in set(family_of(os.getpid()))
        child.kill()


async def test_a_workers_figures_and_its_tasks_are_shown_by_its_service(tmp_path: Path) -> None:
    go_on = threading.Event()

    def train(context: TaskContext) -> TaskResult:
        context.measured(TaskFigures(phase_seconds={"compute": 1.0}))
        context.metrics(1, {"train_loss": 1.0})
        go_on.wait(20)
        return TaskResult(train=TrainResult(step=1))

    heard: list[tuple[int, TaskFigures | None]] = []

    class Observer:
        def reported(self, task: object, events: list[object], figures: TaskFigures | None) -> None:
            heard.append((len(events), figures))

        def began(self, *_: object) -> None: ...

        def checkpointed(self, *_: object) -> None: ...

        def ended(self, *_: object) -> None: ...

    counts = ChildCounts()
    counts.began()
    async with serve(tmp_path / "home") as site:
        site.parts.work_metrics.observers.append(Observer())  # type: ignore[arg-type]
        async with site.worker(train, counts=counts):
            await site.enqueue()
            await site.until(lambda: bool(heard))
            await site.parts.figures.look()
            registry = site.parts.metrics.registry
            assert series(registry, workers.CHILD_STARTS.name) == {("w",): 1.0}
            assert series(registry, workers.TASKS.name) == {("w",): 1.0}
            go_on.set()
            await site.until(lambda: "SUCCEEDED" in site.states)
    assert heard[0][0] == 1
    figures = heard[0][1]
    assert figures is not None
    assert figures.phase_seconds == {"compute": 1.0}
    await asyncio.sleep(0)
