"""What this process may use of its machine: memory, cores, and the processor's name."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


def memory_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Return the memory that this process may take: the machine's, or less where a control group says so; 0: unknown.

    What others hold just now is not taken off: it changes, and a worker is asked once.
    """
    whole = (_number(proc / "meminfo", r"^MemTotal:\s+(\d+) kB$") or 0) * 1024
    limits = [
        *_limits(_above(groups, _group(proc, "")), "memory.max"),
        *_limits(_above(groups / "memory", _group(proc, "memory")), "memory.limit_in_bytes"),
    ]
    return min([whole, *limits]) if whole else 0


def available_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Return the memory that this process and its children may still take; None where the system does not tell.

    That is what the machine has available or, where it is less, what the control groups of this process leave it
    (version 2).
    """
    found = _number(proc / "meminfo", r"^MemAvailable:\s+(\d+) kB$")
    left = [] if found is None else [found * 1024]
    return min([*left, *_left_in_groups(proc, groups)], default=None)


def num_cores(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Return how many cores this process may use: those that it is bound to, or less where a control group says so."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder in _above(groups, _group(proc, "")):
        told = re.fullmatch(r"(\d+) (\d+)", _text(folder / "cpu.max"))
        if told is not None:
            quotas.append(max(1, math.ceil(int(told[1]) / int(told[2]))))
    return min([bound, *quotas])


def processor_name(proc: Path = _PROC) -> str:
    """Return the processor's name, or at least its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found is not None else platform.machine()


def _group(proc: Path, controller: str) -> str:
    """Return the path of this process's control group, of a controller of version 1 or of version 2 (empty)."""
    for one in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = one.partition(":")
        controllers, _, path = rest.partition(":")
        is_it = number == "0" and not controllers if not controller else controller in controllers.split(",")
        if is_it:
            return path
    return "/"


def _above(root: Path, group: str) -> Iterator[Path]:
    """Yield the folder of a group and of each group that it is in, the root's last."""
    folder = root / group.lstrip("/")
    while folder != root and folder.is_relative_to(root):
        yield folder
        folder = folder.parent
    yield root


def _limits(folders: Iterator[Path], name: str) -> Iterator[int]:
    for folder in folders:
        text = _text(folder / name)
        if text.isdigit():  # "max": none
            yield int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    for group in _above(groups, _group(proc, "")):
        limit, used = _number(group / "memory.max", r"^(\d+)$"), _number(group / "memory.current", r"^(\d+)$")
        if limit is not None and used is not None:
            # Files that are only read make room when asked to.
            cached = _number(group / "memory.stat", r"^inactive_file (\d+)$") or 0
            yield limit - used + cached


def _number(path: Path, pattern: str) -> int | None:
    found = re.search(pattern, _text(path), re.MULTILINE)
    return None if found is None else int(found[1])
