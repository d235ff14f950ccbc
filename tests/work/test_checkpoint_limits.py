"""Checkpoints, as workers hand them in: each fault named with its place, and nothing of it kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from tests.work.checkpoints import FILE, checkpoint_of
from tests.work.conftest import Bench

from luthier.errors import InvalidArgument
from luthier.work.results import check_checkpoint
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest


def whole_checkpoint() -> CommitCheckpointRequest:
    return CommitCheckpointRequest(task="t", epoch=1, step=3, files=[FILE], metrics={"train_loss": 0.5})


BAD_CHECKPOINTS: Mapping[str, tuple[Callable[[CommitCheckpointRequest], object], list[str]]] = {
    "no files": (lambda one: one.ClearField("files"), ["files: must hold 1 to 1000 files, got 0"]),
    "more files than any has": (
        lambda one: one.files.extend([FILE] * 1000),
        ["files: must hold 1 to 1000 files, got 1001"],
    ),
    "a file without a digest": (
        lambda one: one.files[0].ClearField("sha256"),
        ["files[0].sha256: must be set, got nothing"],
    ),
    "a digest that is none": (
        lambda one: setattr(one.files[0], "sha256", "x"),
        ["files[0].sha256: must be 64 lowercase hex digits, got 'x'"],
    ),
    "a file without a path": (
        lambda one: one.files[0].ClearField("path"),
        ["files[0].path: must be set, got nothing"],
    ),
    "more metrics than any has": (
        lambda one: one.metrics.update({f"m{number}": 1.0 for number in range(10_001)}),
        ["metrics: must hold at most 10000 metrics, got 10002"],
    ),
    "a metric without a name": (
        lambda one: one.metrics.update({"": 1.0}),
        ["metrics: must have names of 1 to 200 characters, got an empty one"],
    ),
    "a metric with a long name": (
        lambda one: one.metrics.update({"m" * 201: 1.0}),
        ["metrics: must have names of 1 to 200 characters, got one of 201"],
    ),
    "a step before the first": (
        lambda one: setattr(one, "step", -1),
        ["step: must not be negative, got -1"],
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_checkpoint_is_within_its_limits(name: str) -> None:
    change, wanted = BAD_CHECKPOINTS[name]
    checkpoint = whole_checkpoint()
    check_checkpoint(checkpoint)
    change(checkpoint)
    with pytest.raises(InvalidArgument) as caught:
        check_checkpoint(checkpoint)
    assert [f"{one.field}: {one.description}" for one in caught.value.violations] == wanted


async def test_a_checkpoint_beyond_its_limits_is_refused_by_the_queue_itself(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    with pytest.raises(InvalidArgument, match="files: must hold 1 to 1000 files, got 0"):
        await bench.queue.commit_checkpoint(checkpoint_of(task, 1, []))
    assert bench.handler.calls == [("started", 1)], "whoever follows the task hears nothing of it"
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1))
    assert bench.handler.calls[-1] == ("checkpointed", 1)
