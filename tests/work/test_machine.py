"""What a process may use: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.work.control_groups import oom_kills
from luthier.work.machine import available_bytes, memory_bytes, num_cores, processor_name

GIB = 1 << 30


def proc(folder: Path, groups: str, memory_kb: int = 64 * GIB // 1024) -> Path:
    made = folder / "proc"
    (made / "self").mkdir(parents=True)
    meminfo = f"MemTotal:       {memory_kb} kB\nMemFree: 1 kB\nMemAvailable:   {20 << 20} kB\n"
    (made / "meminfo").write_text(meminfo)
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


VERSIONS = {
    "2": ("", "0::{}", "memory.max", "memory.current", "inactive_file"),
    "2 beside 1": ("unified", "0::{}", "memory.max", "memory.current", "inactive_file"),
    "1": (
        "memory",
        "0::/\n4:cpuset,memory:{}",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_left_is_the_machines_or_the_least_of_the_groups_above(tmp_path: Path, version: str) -> None:
    mount, group, most, held, files = VERSIONS[version]
    made, root = proc(tmp_path, group.format("/outer/inner")), tmp_path / "groups"

    def limit(name: str, limit_bytes: str, held_gib: int, files_gib: int) -> None:
        folder = root / mount / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit_bytes}\n")
        (folder / held).write_text(f"{held_gib * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{files} {files_gib * GIB}\nactive_file 7\n")

    limit("outer/inner", "max" if version != "1" else str((1 << 63) - 4096), 3, 0)
    assert available_bytes(made, root) == 20 * GIB
    limit("outer", str(8 * GIB), 5, 1)
    assert available_bytes(made, root) == 4 * GIB
    limit("outer/inner", str(2 * GIB), 1, 0)
    assert available_bytes(made, root) == GIB


def test_what_is_left_of_a_machine_that_says_nothing_is_not_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


@pytest.mark.parametrize(("quota", "most"), [("-1", 1 << 20), ("100000", 1), ("150000", 2)])
def test_cores_are_at_most_the_quota_of_version_1(tmp_path: Path, quota: str, most: int) -> None:
    folder = tmp_path / "groups" / "cpu" / "box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    found = num_cores(proc(tmp_path, "3:cpu,cpuacct:/box"), tmp_path / "groups")
    assert found == min(len(os.sched_getaffinity(0)), most)


@pytest.mark.parametrize(
    ("group", "files", "kills"),
    [
        ("0::/", {}, 3),
        ("0::/box", {"box/memory.events": "oom 9\noom_kill 2\noom_group_kill 0"}, 2),
        ("0::/\n4:memory:/box", {"memory/box/memory.oom_control": "under_oom 0\noom_kill 1"}, 1),
        ("0::/\n4:memory:/", {"memory/memory.oom_control": "under_oom 0\noom_kill 1"}, 3),
    ],
    ids=["of the machine", "version 2", "version 1", "root of version 1"],
)
def test_who_was_ended_for_want_of_memory_is_counted_by_the_group_or_the_machine(
    tmp_path: Path, group: str, files: dict[str, str], kills: int
) -> None:
    made = proc(tmp_path, group)
    (made / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert oom_kills(made, tmp_path / "groups") == kills
    assert oom_kills(tmp_path / "none", tmp_path / "none") == 0


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    assert processor_name(proc(tmp_path, "0::/")) == "Made Up CPU @ 1 GHz"
    assert processor_name(tmp_path / "none") == os.uname().machine


def test_this_very_machine_tells() -> None:
    assert memory_bytes() > GIB // 4
    assert 0 < (available_bytes() or 0) < memory_bytes()
    assert num_cores() >= 1
