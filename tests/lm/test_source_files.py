"""What models are read from: plain files, on a path without links, and nothing that holds a worker."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import InvalidArgument, NotFound, Unavailable
from luthier.lm import source_files
from luthier.lm.register import register_source
from luthier.lm.source_files import staged_file, staged_folder
from luthier.lm.sources import DirectorySource, GgufSource

DEADLINE_SECONDS = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def refused(act: Callable[[], Any]) -> InvalidArgument:
    """Run in a thread: what hangs must fail the test, not hold it."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            found.append(error)
        else:
            found.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive(), f"still reading after {DEADLINE_SECONDS} s"
    assert isinstance(found[0], InvalidArgument), found[0]
    return found[0]


def stage(path: Path, tmp_path: Path) -> None:
    with staged_folder(path, tmp_path / "scratch"):
        pass


def test_staged_folder_lays_out_what_a_model_is_read_from(folder: Path, tmp_path: Path) -> None:
    for name in ("README.md", "modeling.py", "notes.json"):
        (folder / name).write_text("not read")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"not read")
    (folder / ".git").mkdir()
    (folder / ".git" / "link").symlink_to("/etc/hostname")
    with staged_folder(folder, tmp_path / "scratch") as staged:
        assert {path.name for path in staged.iterdir()} == {"config.json", "model.safetensors"}
        # What stands in the folder now is another file: what was checked is what is read.
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(b"exchanged")
        (folder / "config.json").write_text("[]")
        assert (staged / "model.safetensors").read_bytes() == b"weights"
        assert (staged / "config.json").read_text() == "{}"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("name", ["model", "config.json", "model.safetensors"])
@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, Unavailable), (errno.EACCES, InvalidArgument)])
def test_a_disk_that_does_not_answer_is_told_from_a_file_that_may_not_be_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    kind: type[Exception],
) -> None:
    really = os.open

    def broken(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), name)
        return really(path, *arguments, **named)

    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(kind, match=os.strerror(number)):
        stage(folder, tmp_path)


@pytest.mark.parametrize("place", ["x.index.json", "config.json", "model.safetensors", "sub/dir/x", "README"])
def test_staged_folder_opens_no_fifo(folder: Path, tmp_path: Path, place: str) -> None:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    error = refused(lambda: stage(folder, tmp_path))
    assert error.reason == "UNSAFE_MODEL_FILE"
    assert f"{place} is a FIFO" in error.message


def test_registering_a_folder_with_a_fifo_ends(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "x.index.json")
    source = DirectorySource(path=folder)
    error = refused(lambda: register_source(source, tmp_path / "out", scratch=tmp_path / "scratch"))
    assert error.reason == "UNSAFE_MODEL_FILE"
    os.mkfifo(tmp_path / "model.gguf")
    gguf = GgufSource(path=tmp_path / "model.gguf")
    error = refused(lambda: register_source(gguf, tmp_path / "out", scratch=tmp_path / "scratch"))
    assert "model.gguf is a FIFO" in error.message


def test_staged_folder_refuses_sockets(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        assert "s is a socket" in refused(lambda: stage(folder, tmp_path)).message


@pytest.mark.parametrize("place", ["chat_template.jinja", "config.json", "sub/x", "a/b/c/model.safetensors"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_staged_folder_refuses_links_wherever_they_are(
    folder: Path, tmp_path: Path, place: str, kind: str
) -> None:
    secret = tmp_path / "api-key"
    secret.write_text("lk_secret")
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "symbolic":
        path.symlink_to(secret)
    else:
        path.hardlink_to(secret)
    error = refused(lambda: stage(folder, tmp_path))
    assert error.reason == "UNSAFE_MODEL_FILE"
    said = "is a symbolic link" if kind == "symbolic" else "has 2 names (hard links)"
    assert f"{place} {said}" in error.message
    assert "lk_secret" not in error.message


def test_staged_folder_refuses_a_folder_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").symlink_to(tmp_path)
    assert "sub is a symbolic link" in refused(lambda: stage(folder, tmp_path)).message
    (tmp_path / "door").symlink_to(folder.parent)
    for path in (tmp_path / "door" / "model", tmp_path / "door" / "model" / "inner"):
        error = refused(lambda path=path: stage(path, tmp_path))  # type: ignore[misc]
        assert "is a symbolic link or lies below one" in error.message


def test_staged_file_is_the_file_that_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with staged_file(path, tmp_path / "scratch") as staged:
        path.unlink()
        path.write_bytes(b"exchanged")
        assert staged.name == "model.gguf"
        assert staged.read_bytes() == b"GGUF"
    (tmp_path / "other").hardlink_to(path)
    with pytest.raises(InvalidArgument, match="has 2 names"), staged_file(path, tmp_path / "scratch"):
        pass


def test_staged_folder_leaves_no_descriptor_open(folder: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stage(folder, tmp_path)
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(InvalidArgument):
        stage(folder, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["../model", "mo\x00del", "mo\ndel"])
def test_a_path_that_is_not_real_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    error = refused(lambda: stage(folder.parent / "x" / name, tmp_path))
    assert "must be named by its real path" in error.message
    assert name.isprintable() or name not in error.message


def test_limits_of_size_number_and_depth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_bytes(b"x" * (1 << 20))
    stage(folder, tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"x" * ((1 << 20) + 1))
    error = refused(lambda: stage(folder, tmp_path))
    assert error.message == "chat_template.jinja must have at most 1048576 bytes, it has more"
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(source_files, "MAX_ENTRIES", 10)
    (folder / "sub").mkdir()
    for number in range(7):
        (folder / "sub" / f"{number}").touch()
    stage(folder, tmp_path)
    (folder / "sub" / "7").touch()
    assert "at most 10 names" in refused(lambda: stage(folder, tmp_path)).message
    monkeypatch.undo()
    folder.joinpath(*"a" * 16).mkdir(parents=True)
    stage(folder, tmp_path)
    folder.joinpath(*"a" * 17).mkdir(parents=True)
    assert "at most 16 folders deep" in refused(lambda: stage(folder, tmp_path)).message


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model directory nothing"):
        stage(tmp_path / "nothing", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match="no model directory file"):
        stage(tmp_path / "file", tmp_path)
    with pytest.raises(NotFound), staged_file(tmp_path / "file" / "x.gguf", tmp_path):
        pass
