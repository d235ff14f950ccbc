"""The devices that torch can compute on, and which of them a worker's setting means.

`python -m luthier.lm.device WANTED` prints it as a line of JSON, for a worker that has no torch: asking opens drivers.
"""

import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from luthier.errors import InvalidArgument

_SIDE = 64
_log = logging.getLogger(__name__)


def choose_device(wanted: str, warn: Callable[[str], None] = _log.warning) -> torch.device:
    """Return the device that a setting means: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`.

    `auto` is the first GPU that works, else the processor; `warn` is told of a GPU that does not. `rocm` and `rocm:N`
    are GPUs of a torch that was built for ROCm, where torch itself says cuda. What is asked for by name is never
    replaced by something else.

    Raises:
        InvalidArgument: it is none of these, there is no such GPU, or it does not work; the message says what there is.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return _first(found, warn)
    match = re.fullmatch(r"cpu|(cuda|rocm)(?::(\d{1,3}))?", wanted)
    number = int(match[2] or 0) if match else 0
    is_built = match is not None and (match[1] != "rocm" or torch.version.hip is not None)
    if match is None or not is_built or (wanted != "cpu" and number >= found):
        raise InvalidArgument(
            "a worker's device (--device, LUTHIER_WORKER_DEVICE) must be auto, cpu, cuda, cuda:N, rocm or rocm:N and "
            f"be there, got {wanted!r}; there is {_there(found)}"
        )
    if wanted == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", number)
    if problem := fault(device):
        raise InvalidArgument(
            f"a worker's device must work, {wanted} does not: {problem}; there is {_there(found)}"
        )
    return device


def fault(device: torch.device) -> str:
    """Return why a product of matrices in bfloat16 cannot be had of a device; empty when it can."""
    try:
        ones = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
        total = float((ones @ ones).float().sum())
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:300]
    wanted = float(_SIDE**3)
    return "" if total == wanted else f"a product whose sum is {wanted:g} came to {total:g}"


def _first(found: int, warn: Callable[[str], None]) -> torch.device:
    for number in range(found):
        device = torch.device("cuda", number)
        problem = fault(device)
        if not problem:
            return device
        warn(f"the GPU {_kind()}:{number} does not work and is passed over: {problem}")
    return torch.device("cpu")


def _kind() -> str:
    return "rocm" if torch.version.hip is not None else "cuda"


def _there(found: int) -> str:
    names = ["cpu", *(f"{_kind()}:{index} ({torch.cuda.get_device_name(index)})" for index in range(found))]
    without = "" if found else f"; torch {torch.__version__} sees no GPU"
    return f"{', '.join(names)}{without}"


def described(wanted: str) -> dict[str, Any]:
    """Return what `choose_device` does, as JSON: error, or device and warnings.

    Of a GPU also kind, name, memory_bytes and num_devices, how many there are.
    """
    warnings: list[str] = []
    try:
        device = choose_device(wanted, warnings.append)
    except InvalidArgument as error:
        return {"error": error.message}
    if device.type == "cpu":
        return {"device": "cpu", "warnings": warnings}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "warnings": warnings,
        "kind": _kind().upper(),
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "num_devices": torch.cuda.device_count(),
    }


if __name__ == "__main__":
    print(json.dumps(described(sys.argv[1])), flush=True)
