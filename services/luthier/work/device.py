"""The device of a worker, chosen before it registers.

torch alone knows what can be computed on, and asking it may open the driver of a GPU. That is done by a process that
does nothing else and ends: a driver must not be open where processes are forked, and a worker has no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import InvalidArgument, Unavailable
from luthier.runtime import config
from luthier.work.machine import memory_bytes, num_cores, processor_name
from luthier.work.requirements import Equipment

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these is there wherever a driver for GPUs is: NVIDIA's, AMD's, Windows' under WSL."""
_NAMES = r"auto|cpu|(?:cuda|rocm)(?::\d{1,3})?"
_PROBE = ("-P", "-m", "luthier.lm.device")
_PROBE_SECONDS = 300.0
"""A cold disk brings torch in a minute, and a machine with many GPUs opens them one after the other."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDevice:
    """What a worker computes on.

    Attributes:
        name: as torch takes it: cpu, cuda:0.
        equipment: what the service is told of it.
        num_available: how many of its kind this process may use: GPUs, or processors.
    """

    name: str
    equipment: Equipment
    num_available: int

    @property
    def environment(self) -> dict[str, str]:
        """What must be set where torch computes on it, before torch is imported."""
        if self.name == "cpu":
            return {}
        return {
            # Without a workspace of its own cuBLAS may add in another order each time.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            # Asking whether there is a GPU opens none.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every process that computes prepares with.

    Attributes:
        device: as torch takes it; it is there.
        num_threads: torch's; 0: as it likes.
        log_level: of its log.
    """

    device: str
    num_threads: int
    log_level: str


def chosen_device(wanted: str, drivers: tuple[str, ...] = _DRIVERS) -> ChosenDevice:
    """Return the device that a setting means: auto, cpu, cuda, cuda:N, rocm or rocm:N.

    `auto` is the first GPU that works, else the processor. What is asked for by name is never replaced.

    Raises:
        InvalidArgument: it is none of these, or not there, or does not work; the message says what there is.
        Unavailable: torch cannot be asked.
    """
    if not re.fullmatch(_NAMES, wanted):
        raise InvalidArgument(
            "a worker's device (--device, LUTHIER_WORKER_DEVICE) must be auto, cpu, cuda, cuda:N, rocm or rocm:N, "
            f"got {wanted!r}"
        )
    if wanted == "cpu" or (wanted == "auto" and not any(map(os.path.exists, drivers))):
        return _told(_processors())
    found = answer_of((*_PROBE, wanted), "the devices of this machine", "LUTHIER_WORKER_DEVICE=cpu asks none")
    if error := found.get("error"):
        raise InvalidArgument(error)
    for warning in found["warnings"]:
        _logger.warning(warning)
    if found["device"] == "cpu":
        return _told(_processors())
    equipment = Equipment(
        device=found["kind"],
        device_name=found["name"],
        num_devices=1,
        memory_bytes=found["memory_bytes"],
        num_cores=num_cores(),
    )
    return _told(ChosenDevice(name=found["device"], equipment=equipment, num_available=found["num_devices"]))


def processor() -> Equipment:
    """Return what a worker has that computes on the processor."""
    return Equipment(
        device="CPU",
        device_name=processor_name(),
        num_devices=1,
        memory_bytes=memory_bytes(),
        num_cores=num_cores(),
    )


def _processors() -> ChosenDevice:
    return ChosenDevice(name="cpu", equipment=processor(), num_available=num_cores())


def _told(chosen: ChosenDevice) -> ChosenDevice:
    _logger.info("the worker's device", extra={"device": chosen.name, "detail": f"it {chosen.equipment}"})
    return chosen


def answer_of(command: Sequence[str], about: str, remedy: str) -> dict[str, Any]:
    """Return what a process that asks prints last, a line of JSON; it has ended then.

    Args:
        command: arguments of the interpreter.
        about: what it asks about, for people.
        remedy: what asks nothing, for people.

    Raises:
        Unavailable: it does not answer, or fails.
    """
    try:
        done = subprocess.run(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            env=config.others(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{about} must be known within {_PROBE_SECONDS:g} s, asking for it hangs; {remedy}"
        ) from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise Unavailable(
            f"{about} cannot be asked for: the process that asks ended with {done.returncode} and "
            f"said {last[:500]}"
        )
    found: dict[str, Any] = json.loads(lines[-1])
    return found
