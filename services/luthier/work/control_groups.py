"""The control groups of this process, of version 1 and of version 2: what they allow, what is held, who was ended.

A machine may have both, each controller in one of them. Where nothing is mounted, or nothing limited, there is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
_UNIFIED = "unified"
"""Where version 2 is mounted beside controllers of version 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The memory of a group that has a limit, in bytes.

    Attributes:
        most: that its processes may hold together.
        held: what they hold.
        reclaimable: part of it that holds files and makes room when asked to.
    """

    most: int
    held: int
    reclaimable: int

    @property
    def left(self) -> int:
        """What they may still take."""
        return self.most - self.held + self.reclaimable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What the files of a version are called."""

    most: str
    held: str
    reclaimable: str


_VERSION_2 = _Names(most="memory.max", held="memory.current", reclaimable="inactive_file")
_VERSION_1 = _Names(
    most="memory.limit_in_bytes", held="memory.usage_in_bytes", reclaimable="total_inactive_file"
)


def memory_limits(proc: Path = PROC, groups: Path = GROUPS) -> Iterator[MemoryLimit]:
    """Yield the limit of this process's group, and of each that it is in, where there is one."""
    for names, folders in (
        (_VERSION_2, _folders_2(proc, groups)),
        (_VERSION_1, _folders_1(proc, groups, "memory")),
    ):
        for folder in folders:
            most = read(folder / names.most)
            if most.isdigit():  # "max": none
                yield MemoryLimit(
                    most=int(most),
                    held=_whole(read(folder / names.held)),
                    reclaimable=number_in(folder / "memory.stat", rf"^{names.reclaimable} (\d+)$") or 0,
                )


def processor_quotas(proc: Path = PROC, groups: Path = GROUPS) -> Iterator[float]:
    """Yield how many processors this process's group, and each that it is in, may use, where that is limited."""
    for folder in _folders_2(proc, groups):
        told = re.fullmatch(r"(\d+) (\d+)", read(folder / "cpu.max"))
        if told is not None:
            yield int(told[1]) / int(told[2])
    for folder in _folders_1(proc, groups, "cpu"):
        quota, period = read(folder / "cpu.cfs_quota_us"), _whole(read(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period:  # "-1": none
            yield int(quota) / period


def oom_kills(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Return how many processes the kernel has ended for want of memory.

    Those of this process's group where the kernel counts them, else those of the machine; 0 where it counts none.
    """
    own_2, own_1 = next(_folders_2(proc, groups)), next(_folders_1(proc, groups, "memory"), None)
    counters = [own_2 / "memory.events"]
    # The root of version 1 has no limit of its own, and what ends there is of the machine.
    if own_1 is not None and own_1 != groups / "memory":
        counters.append(own_1 / "memory.oom_control")
    for path in (*counters, proc / "vmstat"):
        if (found := number_in(path, r"^oom_kill (\d+)$")) is not None:
            return found
    return 0


def number_in(path: Path, pattern: str) -> int | None:
    """Return what a file of the kernel says where a pattern finds it; None where it says nothing."""
    found = re.search(pattern, read(path), re.MULTILINE)
    return None if found is None else int(found[1])


def read(path: Path) -> str:
    """Return the text of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _folders_2(proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the folder of this process's group of version 2, and of each that it is in, the root's last."""
    root = groups / _UNIFIED if (groups / _UNIFIED).is_dir() else groups
    return _above(root, _group(proc, ""))


def _folders_1(proc: Path, groups: Path, controller: str) -> Iterator[Path]:
    """Yield the same of a controller of version 1; nothing where that is not mounted."""
    root = groups / controller
    return _above(root, _group(proc, controller)) if root.is_dir() else iter(())


def _group(proc: Path, controller: str) -> str:
    """Return the path of this process's group: of a controller of version 1, or of version 2 (empty)."""
    for one in read(proc / "self" / "cgroup").splitlines():
        number, _, rest = one.partition(":")
        controllers, _, path = rest.partition(":")
        is_it = number == "0" and not controllers if not controller else controller in controllers.split(",")
        if is_it:
            return path
    return "/"


def _above(root: Path, group: str) -> Iterator[Path]:
    folder = root / group.lstrip("/")
    while folder != root and folder.is_relative_to(root):
        yield folder
        folder = folder.parent
    yield root


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0
