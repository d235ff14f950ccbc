"""What a process may use: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.work.machine import memory_bytes, num_cores, processor_name

GIB = 1 << 30


def proc(folder: Path, groups: str, memory_kb: int = 64 * GIB // 1024) -> Path:
    made = folder / "proc"
    (made / "self").mkdir(parents=True)
    (made / "meminfo").write_text(f"MemTotal:       {memory_kb} kB\nMemFree: 1 kB\n")
    (made / "self" / "cgroup").write_text(groups)
    (made / "cpuinfo").write_text("processor : 0\nmodel name\t: Made Up CPU @ 1 GHz\nmodel name\t: another\n")
    return made


@pytest.mark.parametrize(
    ("group", "limits", "gib"),
    [
        ("0::/", {}, 64),
        ("0::/", {"memory.max": "max"}, 64),
        ("0::/", {"memory.max": str(8 * GIB)}, 8),
        ("0::/pod/box", {"pod/box/memory.max": "max", "pod/memory.max": str(12 * GIB)}, 12),
        ("0::/pod/box", {"pod/box/memory.max": str(4 * GIB), "pod/memory.max": str(12 * GIB)}, 4),
        ("0::/", {"memory.max": str(200 * GIB)}, 64),
        ("9:cpu,cpuacct:/a\n8:memory:/a", {"memory/a/memory.limit_in_bytes": str(6 * GIB)}, 6),
        ("8:memory:/a", {"memory/a/memory.limit_in_bytes": str((1 << 63) - 4096)}, 64),
    ],
)
def test_memory_is_the_machines_or_the_least_limit_above(
    tmp_path: Path, group: str, limits: dict[str, str], gib: int
) -> None:
    for name, text in limits.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert memory_bytes(proc(tmp_path, group), tmp_path / "groups") == gib * GIB


def test_memory_that_nobody_tells_is_unknown(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path / "none", tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("quota", "most"), [("max 100000", 1 << 20), ("100000 100000", 1), ("50000 100000", 1)]
)
def test_cores_are_those_bound_to_or_the_quota(tmp_path: Path, quota: str, most: int) -> None:
    groups = tmp_path / "groups"
    groups.mkdir()
    (groups / "cpu.max").write_text(f"{quota}\n")
    bound = len(os.sched_getaffinity(0))
    assert num_cores(proc(tmp_path, "0::/"), groups) == min(bound, most)


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    assert processor_name(proc(tmp_path, "0::/")) == "Made Up CPU @ 1 GHz"
    assert processor_name(tmp_path / "none") == os.uname().machine


def test_this_very_machine_tells() -> None:
    assert memory_bytes() > GIB // 4
    assert num_cores() >= 1
