"""What a task requires of a worker, and what a worker has."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.v1 import device_pb2
from luthier.worker.v1 import worker_service_pb2

GIB = 1 << 30
_PREFIX = "DEVICE_KIND_"
_GPUS = frozenset({"CUDA", "ROCM"})
_DEVICE_WORDS = {"CPU": "CPU", "CUDA": "CUDA", "ROCM": "ROCm", "GPU": "CUDA or ROCm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a worker must have to be given a task.

    Attributes:
        device: CPU, CUDA, ROCM, or GPU for either of the two; empty: any.
        memory_bytes: least memory of that device; 0: any.
    """

    device: str = ""
    memory_bytes: int = 0

    def __str__(self) -> str:
        device = f"a {_DEVICE_WORDS.get(self.device, self.device)} device" if self.device else "a device"
        return f"{device} with at least {_gib(self.memory_bytes)}" if self.memory_bytes else device


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a worker computes with. One that does not say meets no requirement, and takes tasks without any.

    Attributes:
        device: CPU, CUDA or ROCM; empty: not said.
        device_name: for people.
        num_devices: of that kind that it computes on.
        memory_bytes: of one of them; on CPU what it may take of the machine's; 0: not said.
        num_cores: processor cores that it may use; 0: not said.
    """

    device: str = ""
    device_name: str = ""
    num_devices: int = 0
    memory_bytes: int = 0
    num_cores: int = 0

    @property
    def devices_met(self) -> tuple[str, ...]:
        """Each `Requirements.device` that it meets."""
        if not self.device:
            return ("",)
        return ("", self.device, *(("GPU",) if self.device in _GPUS else ()))

    def meets(self, required: Requirements) -> bool:
        """Whether a task with these requirements may be given to it."""
        return required.device in self.devices_met and required.memory_bytes <= self.memory_bytes

    def __str__(self) -> str:
        if not self.device:
            return "does not say what it has"
        name = f" ({self.device_name})" if self.device_name else ""
        number = f"{self.num_devices} x " if self.num_devices > 1 else ""
        memory = f" with {_gib(self.memory_bytes)}" if self.memory_bytes else ""
        return f"has {number}{_DEVICE_WORDS.get(self.device, self.device)}{name}{memory}"


def read_requirements(message: device_pb2.Requirements) -> Requirements:
    """Return what a message requires."""
    return Requirements(device=_device(message.device), memory_bytes=message.min_memory_bytes)


def read_equipment(message: worker_service_pb2.Equipment) -> Equipment:
    """Return what a worker says that it has."""
    return Equipment(
        device=_device(message.device),
        device_name=message.device_name,
        num_devices=message.num_devices,
        memory_bytes=message.memory_bytes,
        num_cores=message.num_cores,
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
    )


def _device(number: device_pb2.DeviceKind.ValueType) -> str:
    return device_pb2.DeviceKind.Name(number).removeprefix(_PREFIX) if number else ""


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
