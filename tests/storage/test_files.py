"""Files that survive a crash: what a sweep removes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.errors import InvalidArgument
from luthier.storage.files import open_locked, path_below, remove_unlocked, try_lock


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


def test_a_lock_is_refused_at_once_while_another_holds_it(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    first.close()
    second = try_lock(tmp_path / "lock")
    assert second is not None
    second.close()


@pytest.mark.parametrize("relative", ["a", "a/b.bin", "..a/b..", "a b/ü"])
def test_a_relative_path_is_joined(tmp_path: Path, relative: str) -> None:
    assert path_below(tmp_path, relative) == tmp_path / relative


@pytest.mark.parametrize(
    "relative",
    ["", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "a/", "a\0b", "a\\..\\b", "link/x"],
)
def test_a_path_that_leaves_its_folder_is_refused(tmp_path: Path, relative: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        path_below(folder, relative)
    assert caught.value.reason == "PATH_NOT_ALLOWED"
    assert repr(relative) in caught.value.message
