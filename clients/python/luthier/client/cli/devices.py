"""Classes of devices as they are said on a command line: `gpu:80:989`."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from luthier.v1.fine_tuning_job_pb2 import DeviceClass

_WORDS = re.compile(r"(cpu|gpu)(?::([\d.]*))?(?::([\d.]+))?")
_GIB = 1 << 30


def device_class(text: str) -> DeviceClass | None:
    """Return the class of devices that `kind[:GiB[:TFLOP/s]]` says; None for nothing.

    Raises:
        click.BadParameter: it is not of that form.
    """
    from luthier.v1.fine_tuning_job_pb2 import DeviceClass

    if not text:
        return None
    match = _WORDS.fullmatch(text)
    memory, rate = (_number(match[place]) for place in (2, 3)) if match else (None, None)
    if match is None or memory is None or rate is None:
        raise click.BadParameter(
            f"must be cpu or gpu, then GiB of memory and TFLOP/s where known, as gpu:80:989 or cpu:16, got {text!r}",
            param_hint="--device",
        )
    return DeviceClass(
        kind=DeviceClass.KIND_GPU if match[1] == "gpu" else DeviceClass.KIND_CPU,
        memory_bytes=round(memory * _GIB),
        operations_per_second=rate * 1e12,
    )


def _number(text: str | None) -> float | None:
    """Return a number that is said, 0 where none is, None where it is none."""
    try:
        value = float(text or 0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
