"""Rollouts, as workers hand them in: each fault named with its place, and nothing of it kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from tests.work.checkpoints import FILE
from tests.work.conftest import Bench

from luthier.errors import InvalidArgument
from luthier.work.results import check_rollouts
from luthier.worker.v1.worker_service_pb2 import CommitRolloutsRequest


def whole_rollouts() -> CommitRolloutsRequest:
    return CommitRolloutsRequest(task="t", epoch=1, step=3, file=FILE, num_rollouts=8)


BAD_ROLLOUTS: Mapping[str, tuple[Callable[[CommitRolloutsRequest], object], list[str]]] = {
    "no file": (lambda one: one.ClearField("file"), ["file: must be set, got nothing"]),
    "no digest": (lambda one: one.file.ClearField("sha256"), ["file.sha256: must be set, got nothing"]),
    "no path": (lambda one: one.file.ClearField("path"), ["file.path: must be set, got nothing"]),
    "no step": (lambda one: one.ClearField("step"), ["step: must be at least 1, got 0"]),
    "none of them": (
        lambda one: one.ClearField("num_rollouts"),
        ["num_rollouts: must be in 1..1048576, got 0"],
    ),
    "more than any has": (
        lambda one: setattr(one, "num_rollouts", 1 << 21),
        ["num_rollouts: must be in 1..1048576, got 2097152"],
    ),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_rollouts_are_within_their_limits(name: str) -> None:
    change, wanted = BAD_ROLLOUTS[name]
    rollouts = whole_rollouts()
    check_rollouts(rollouts)
    change(rollouts)
    with pytest.raises(InvalidArgument) as caught:
        check_rollouts(rollouts)
    assert [f"{one.field}: {one.description}" for one in caught.value.violations] == wanted


async def test_rollouts_beyond_their_limits_are_refused_by_the_queue_itself(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    rollouts = whole_rollouts()
    rollouts.task, rollouts.epoch = task.task_id, task.epoch
    rollouts.ClearField("step")
    with pytest.raises(InvalidArgument, match="step: must be at least 1, got 0"):
        await bench.queue.commit_rollouts(rollouts)
    assert bench.handler.rollouts == [], "whoever follows the task hears nothing of it"
    rollouts.step = 1
    await bench.queue.commit_rollouts(rollouts)
    assert bench.handler.rollouts == [rollouts]
