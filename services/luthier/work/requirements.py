"""What a task requires of a worker, and what a worker has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from luthier.v1 import device_pb2
from luthier.worker.v1 import worker_service_pb2

GIB = 1 << 30
Unmet = Literal["device", "memory", "ranks"]
"""What of `Requirements` a worker may lack."""
_PREFIX = "DEVICE_KIND_"
_GPUS = frozenset({"CUDA", "ROCM"})
_DEVICE_WORDS = {"CPU": "CPU", "CUDA": "CUDA", "ROCM": "ROCm", "GPU": "CUDA or ROCm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a worker must have to be given a task.

    Attributes:
        device: CPU, CUDA, ROCM, or GPU for either of the two; empty: any.
        memory_bytes: least memory of that device; 0: any.
        num_ranks: least ranks; 0 and 1: any.
    """

    device: str = ""
    memory_bytes: int = 0
    num_ranks: int = 0

    def __str__(self) -> str:
        device = f"a {_DEVICE_WORDS.get(self.device, self.device)} device" if self.device else "a device"
        memory = f" with at least {_gib(self.memory_bytes)}" if self.memory_bytes else ""
        ranks = f" and at least {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{device}{memory}{ranks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a worker computes with. One that does not say meets no requirement, and takes tasks without any.

    Attributes:
        device: CPU, CUDA or ROCM; empty: not said.
        device_name: for people.
        num_devices: of that kind that it computes on.
        memory_bytes: of one of them; on CPU what it may take of the machine's; 0: not said.
        num_cores: processor cores that it may use; 0: not said.
        num_ranks: that it trains a job on at most; 0: not said, which is one.
    """

    device: str = ""
    device_name: str = ""
    num_devices: int = 0
    memory_bytes: int = 0
    num_cores: int = 0
    num_ranks: int = 0

    @property
    def devices_met(self) -> tuple[str, ...]:
        """Each `Requirements.device` that it meets."""
        if not self.device:
            return ("",)
        return ("", self.device, *(("GPU",) if self.device in _GPUS else ()))

    @property
    def ranks_met(self) -> int:
        """Most `Requirements.num_ranks` that it meets."""
        return max(1, self.num_ranks)

    def unmet(self, required: Requirements) -> tuple[Unmet, ...]:
        """Return what of some requirements it does not meet."""
        met: Mapping[Unmet, bool] = {
            "device": required.device in self.devices_met,
            "memory": required.memory_bytes <= self.memory_bytes,
            "ranks": required.num_ranks <= self.ranks_met,
        }
        return tuple(name for name, is_met in met.items() if not is_met)

    def meets(self, required: Requirements) -> bool:
        """Whether a task with these requirements may be given to it."""
        return not self.unmet(required)

    def __str__(self) -> str:
        if not self.device:
            return "does not say what it has"
        name = f" ({self.device_name})" if self.device_name else ""
        number = f"{self.num_devices} x " if self.num_devices > 1 else ""
        memory = f" with {_gib(self.memory_bytes)}" if self.memory_bytes else ""
        ranks = f" and {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"has {number}{_DEVICE_WORDS.get(self.device, self.device)}{name}{memory}{ranks}"


def read_requirements(message: device_pb2.Requirements, num_ranks: int = 0) -> Requirements:
    """Return what a message requires, and ranks."""
    return Requirements(
        device=_device(message.device), memory_bytes=message.min_memory_bytes, num_ranks=num_ranks
    )


def read_equipment(message: worker_service_pb2.Equipment) -> Equipment:
    """Return what a worker says that it has."""
    return Equipment(
        device=_device(message.device),
        device_name=message.device_name,
        num_devices=message.num_devices,
        memory_bytes=message.memory_bytes,
        num_cores=message.num_cores,
        num_ranks=message.num_ranks,
    )


def equipment_message(equipment: Equipment) -> worker_service_pb2.Equipment:
    """Return how a worker says what it has."""
    device = device_pb2.DeviceKind.Value(f"{_PREFIX}{equipment.device or 'UNSPECIFIED'}")
    return worker_service_pb2.Equipment(
        device=device,
        device_name=equipment.device_name,
        num_devices=equipment.num_devices,
        memory_bytes=equipment.memory_bytes,
        num_cores=equipment.num_cores,
        num_ranks=equipment.num_ranks,
    )


def _device(number: device_pb2.DeviceKind.ValueType) -> str:
    return device_pb2.DeviceKind.Name(number).removeprefix(_PREFIX) if number else ""


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
