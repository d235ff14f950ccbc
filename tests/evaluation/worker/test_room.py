"""How much memory is left, as the kernel says it, and what fits into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.evaluation.worker import room
from luthier.evaluation.worker.room import fits_in_memory, memory_is_short
from luthier.work.machine import available_bytes

GIB = 1 << 30


def machine(folder: Path, *, group: str = "", available_gib: int = 20) -> tuple[Path, Path]:
    proc, groups = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable:   {available_gib << 20} kB\nSwapFree: 0 kB\n"
    )
    (proc / "self" / "cgroup").write_text(f"0::{group}\n" if group else "5:memory:/one\n")
    groups.mkdir()
    return proc, groups


def limited(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")


def test_a_machine_without_groups_leaves_what_is_available(tmp_path: Path) -> None:
    assert available_bytes(*machine(tmp_path)) == 20 * GIB


def test_the_smallest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, group="/outer/inner")
    limited(groups / "outer" / "inner", "max", 3 * GIB, 0)
    assert available_bytes(proc, groups) == 20 * GIB
    limited(groups / "outer", str(8 * GIB), 5 * GIB, GIB)
    assert available_bytes(proc, groups) == 4 * GIB
    limited(groups / "outer" / "inner", str(2 * GIB), GIB, 0)
    assert available_bytes(proc, groups) == GIB


def test_of_a_machine_that_says_nothing_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
    monkeypatch.setattr(room, "available_bytes", lambda: None)
    assert not fits_in_memory(1, 0)
    assert not memory_is_short()


def test_this_machine_says_it() -> None:
    assert (available_bytes() or 0) > 0


@pytest.mark.parametrize(("left", "is_short"), [(0, True), (1 << 20, True), (4 * GIB, False)])
def test_memory_is_short_where_little_is_left(
    left: int, *, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: left)
    assert memory_is_short() is is_short


@pytest.mark.parametrize(
    ("needed", "held", "fits"),
    [(1, 0, True), (3, 5, True), (3, 6, False), (6, 0, True), (7, 0, False), (100, 0, False)],
)
def test_a_model_fits_with_its_caches_beside_the_weights_of_others(
    needed: int, held: int, *, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 10 * GIB)
    assert fits_in_memory(needed * GIB, held * GIB) is fits
