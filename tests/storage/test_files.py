"""Files that survive a crash: what a sweep removes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.storage.files import open_locked, remove_unlocked


def test_a_sweep_removes_what_no_living_writer_holds(tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"half")
    with open_locked(tmp_path / "held"):
        assert remove_unlocked(tmp_path) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["held"]


def test_a_sweep_passes_over_what_another_one_took_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left").write_bytes(b"half")
    listed = Path.iterdir

    def late(directory: Path) -> Iterator[Path]:
        yield directory / "gone"
        yield from listed(directory)

    monkeypatch.setattr(Path, "iterdir", late)
    assert remove_unlocked(tmp_path) == 1
