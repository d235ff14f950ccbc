"""What /metrics says of the checkpoints of tasks: how large they are, and how long they take."""

from __future__ import annotations

import time
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.work.checkpoints import FILE, checkpoint_of
from tests.work.conftest import Bench
from tests.work.hosted import serve

from luthier.runtime.catalogue import work_done
from luthier.runtime.metric import Metric
from luthier.work.context import TaskContext
from luthier.work.metrics import WorkMetrics
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import TaskResult, TrainResult

SIZES = ((70_000, 5), (200,))
"""Bytes of the files of each checkpoint."""


def value(registry: CollectorRegistry, metric: Metric, part: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"{metric.name}_{part}", {"kind": "TRAIN"} | labels)


async def test_checkpoints_are_shown_with_their_sizes_and_seconds(tmp_path: Path) -> None:
    elapsed: list[float] = []

    def train(context: TaskContext) -> TaskResult:
        for step, sizes in enumerate(SIZES, 1):
            paths = [context.scratch / f"{step}-{number}" for number in range(len(sizes))]
            for path, size in zip(paths, sizes, strict=True):
                path.write_bytes(bytes(size))
            began = time.monotonic()
            context.begin_checkpoint(step, paths, {})
            files = context.checkpoint_stored()
            elapsed.append(time.monotonic() - began)
        return TaskResult(train=TrainResult(files=files, step=len(SIZES)))

    async with serve(tmp_path / "home") as site:
        registry = site.parts.metrics.registry
        await site.enqueue()
        async with site.worker(train):
            await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
        assert site.handler.failures == []
    sizes = work_done.CHECKPOINT_BYTES
    assert value(registry, sizes, "count") == len(SIZES)
    assert value(registry, sizes, "sum") == sum(map(sum, SIZES))
    assert value(registry, sizes, "bucket", le="65536.0") == 1.0, "files of a checkpoint count together"
    seconds = work_done.CHECKPOINT_SECONDS
    assert value(registry, seconds, "count") == len(SIZES)
    assert 0.0 < (value(registry, seconds, "sum") or 0.0) <= sum(elapsed)


async def test_a_checkpoint_whose_worker_says_no_time_has_a_size_alone(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    bench.queue.metrics.checkpointed(task, checkpoint_of(task, 1))
    assert value(bench.registry, work_done.CHECKPOINT_BYTES, "sum") == FILE.size_bytes
    assert value(bench.registry, work_done.CHECKPOINT_SECONDS, "count") == 0.0


def test_tasks_that_keep_no_checkpoints_have_no_series_of_them() -> None:
    registry = CollectorRegistry()
    WorkMetrics(registry, (TaskKind.TRAIN, TaskKind.REGISTER_MODEL))
    for metric in (work_done.CHECKPOINT_BYTES, work_done.CHECKPOINT_SECONDS):
        assert value(registry, metric, "count") == 0.0
        assert value(registry, metric, "count", kind="REGISTER_MODEL") is None
