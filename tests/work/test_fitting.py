"""Why no worker can be given a task: the first requirement that nobody meets, and what there is."""

from __future__ import annotations

import pytest

from luthier.work.fitting import failure_of
from luthier.work.requirements import GIB, Equipment, Requirements
from luthier.work.tasks import TaskKind
from luthier.work.workers import Worker

NONE = Requirements()
A_GPU = Requirements(device="CUDA", memory_bytes=24 * GIB)
CPU = Equipment(device="CPU", device_name="a processor", memory_bytes=16 * GIB)


def worker(name: str, equipment: Equipment, *kinds: TaskKind) -> Worker:
    return Worker(worker_id=name, instance="1", kinds=kinds or (TaskKind.TRAIN,), equipment=equipment)


def test_one_that_can_is_enough() -> None:
    small = worker("a", CPU)
    large = worker("b", Equipment(device="CUDA", memory_bytes=24 * GIB))
    assert failure_of(TaskKind.TRAIN, A_GPU, [small, large]) is None
    assert failure_of(TaskKind.TRAIN, NONE, [worker("old", Equipment())]) is None


@pytest.mark.parametrize(
    ("kind", "service"),
    [("RENDER", "data"), ("REGISTER_MODEL", "training"), ("MERGE", "training"), ("EVALUATE", "evaluation")],
)
def test_without_a_worker_of_the_kind_it_says_which_to_start(kind: str, service: str) -> None:
    failure = failure_of(TaskKind(kind), NONE, [worker("a", CPU)])
    assert failure is not None
    assert (failure.code, failure.reason) == ("UNAVAILABLE", "NO_FITTING_WORKER")
    assert failure.metadata == {"requirement": "kind", "kind": kind}
    assert failure.message == f"no {service} worker is there to do it; start one: luthierd worker {service}"


def test_without_the_device_it_says_what_there_is() -> None:
    workers = [worker("b", Equipment()), worker("a", CPU), worker("data", CPU, TaskKind.RENDER)]
    failure = failure_of(TaskKind.TRAIN, A_GPU, workers)
    assert failure is not None
    assert failure.metadata["requirement"] == "device"
    assert failure.message == (
        "no worker that is there can do it: it requires a CUDA device with at least 24.0 GiB; "
        "a has CPU (a processor) with 16.0 GiB, b does not say what it has"
    )


def test_without_the_ranks_it_says_which_worker_to_start() -> None:
    wide = Equipment(device="CPU", memory_bytes=16 * GIB, num_ranks=2)
    workers = [worker("a", CPU), worker("b", wide)]
    assert failure_of(TaskKind.TRAIN, Requirements(num_ranks=2), workers) is None
    failure = failure_of(TaskKind.TRAIN, Requirements(num_ranks=4), workers)
    assert failure is not None
    assert failure.metadata["requirement"] == "ranks"
    assert failure.message == (
        "no worker that is there can do it: it requires a device and at least 4 ranks; a has CPU (a processor) with "
        "16.0 GiB, b has CPU with 16.0 GiB and 2 ranks; start one: luthierd worker training --executor torchrun "
        "--ranks 4"
    )


def test_what_one_has_of_device_and_another_of_memory_is_told_by_who_has_the_device() -> None:
    large = Equipment(device="CPU", memory_bytes=64 * GIB, num_ranks=8)
    small = Equipment(device="CUDA", memory_bytes=8 * GIB)
    failure = failure_of(TaskKind.TRAIN, A_GPU, [worker("a", large), worker("b", small)])
    assert failure is not None
    assert failure.metadata["requirement"] == "memory"


def test_without_the_memory_it_says_so() -> None:
    small = Equipment(device="CUDA", device_name="a GPU", memory_bytes=8 * GIB)
    failure = failure_of(TaskKind.TRAIN, A_GPU, [worker(f"w{number}", small) for number in range(6)])
    assert failure is not None
    assert failure.metadata["requirement"] == "memory"
    assert failure.message.endswith("w3 has CUDA (a GPU) with 8.0 GiB, 2 more")
