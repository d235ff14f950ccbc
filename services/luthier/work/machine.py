"""What this process may use of its machine: memory, cores, and the processor's name."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

from luthier.work.control_groups import GROUPS, PROC, memory_limits, number_in, processor_quotas, read


def memory_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Return the memory that this process may take: the machine's, or less where a control group says so; 0: unknown.

    What others hold just now is not taken off: it changes, and a worker is asked once.
    """
    whole = _kilobytes(proc, "MemTotal")
    return min([whole, *(limit.most for limit in memory_limits(proc, groups))]) if whole else 0


def available_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Return the memory that this process and its children may still take; None where the system does not tell.

    That is what the machine has available or, where it is less, what the control groups of this process leave it; what
    the kernel keeps of files counts as free.
    """
    whole = _kilobytes(proc, "MemAvailable")
    left = [] if whole is None else [whole]
    return min([*left, *(limit.left for limit in memory_limits(proc, groups))], default=None)


def num_cores(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Return how many cores this process may use: those that it is bound to, or less where a control group says so."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([bound, *(max(1, math.ceil(quota)) for quota in processor_quotas(proc, groups))])


def processor_name(proc: Path = PROC) -> str:
    """Return the processor's name, or at least its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", read(proc / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found is not None else platform.machine()


def _kilobytes(proc: Path, name: str) -> int | None:
    found = number_in(proc / "meminfo", rf"^{name}:\s+(\d+) kB$")
    return None if found is None else found * 1024
