"""What a worker has meets what a task requires, or does not."""

from __future__ import annotations

import pytest

from luthier.v1 import device_pb2
from luthier.work.requirements import (
    GIB,
    Equipment,
    Requirements,
    equipment_message,
    read_equipment,
    read_requirements,
)
from luthier.worker.v1 import worker_service_pb2

CPU = Equipment(device="CPU", device_name="a processor", num_devices=1, memory_bytes=16 * GIB, num_cores=4)
CUDA = Equipment(device="CUDA", device_name="a GPU", num_devices=2, memory_bytes=80 * GIB, num_cores=16)
ROCM = Equipment(device="ROCM", num_devices=1, memory_bytes=64 * GIB)
WIDE = Equipment(device="CPU", num_ranks=4)


@pytest.mark.parametrize(
    ("device", "memory_gib", "met_by"),
    [
        ("", 0, "CPU CUDA ROCM unsaid"),
        ("CPU", 0, "CPU"),
        ("CUDA", 0, "CUDA"),
        ("ROCM", 0, "ROCM"),
        ("GPU", 0, "CUDA ROCM"),
        ("", 16, "CPU CUDA ROCM"),
        ("", 64, "CUDA ROCM"),
        ("GPU", 65, "CUDA"),
        ("CPU", 17, ""),
    ],
)
def test_a_requirement_is_met_by_its_device_with_its_memory(
    device: str, memory_gib: int, met_by: str
) -> None:
    required = Requirements(device=device, memory_bytes=memory_gib * GIB)
    workers = {"CPU": CPU, "CUDA": CUDA, "ROCM": ROCM, "unsaid": Equipment()}
    assert " ".join(name for name, has in workers.items() if has.meets(required)) == met_by


def test_both_are_said_for_people() -> None:
    assert str(Requirements()) == "a device"
    assert str(Requirements(device="CUDA")) == "a CUDA device"
    assert (
        str(Requirements(device="GPU", memory_bytes=24 * GIB))
        == "a CUDA or ROCm device with at least 24.0 GiB"
    )
    assert str(Requirements(memory_bytes=3 * GIB // 2)) == "a device with at least 1.5 GiB"
    assert str(CPU) == "has CPU (a processor) with 16.0 GiB"
    assert str(CUDA) == "has 2 x CUDA (a GPU) with 80.0 GiB"
    assert str(Equipment()) == "does not say what it has"
    assert str(WIDE) == "has CPU and 4 ranks"
    assert str(Requirements(num_ranks=1)) == "a device"
    assert (
        str(Requirements(num_ranks=4, memory_bytes=GIB))
        == "a device with at least 1.0 GiB and at least 4 ranks"
    )


@pytest.mark.parametrize(
    ("least", "has", "is_met"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (2, 1, False), (2, 2, True), (2, 8, True)],
)
def test_ranks_are_met_by_as_many(least: int, has: int, is_met: bool) -> None:
    assert Equipment(num_ranks=has).meets(Requirements(num_ranks=least)) == is_met


@pytest.mark.parametrize("has", [CPU, CUDA, ROCM, WIDE, Equipment()])
def test_equipment_goes_over_the_wire_as_it_is(has: Equipment) -> None:
    wire = equipment_message(has).SerializeToString()
    assert read_equipment(worker_service_pb2.Equipment.FromString(wire)) == has


def test_messages_that_say_nothing_require_and_have_nothing() -> None:
    assert read_requirements(device_pb2.Requirements()) == Requirements()
    assert read_equipment(worker_service_pb2.Equipment()) == Equipment()
    asked = device_pb2.Requirements(device=device_pb2.DEVICE_KIND_GPU, min_memory_bytes=5)
    assert read_requirements(asked) == Requirements(device="GPU", memory_bytes=5)
