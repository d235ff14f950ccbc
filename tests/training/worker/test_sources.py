"""Paths of base models on the worker's machine: below its roots, and no symbolic link on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.runtime.config import read
from luthier.storage.blobs import MARK_NAME
from luthier.training.worker.sources import allowed_roots, resolve_allowed
from luthier.work.worker_config import WorkerConfig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "model").mkdir(parents=True)
    (root / "model" / "config.json").write_text("{}")
    (root / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret").mkdir()
    return root


def test_resolve_allowed_returns_the_real_path(root: Path, tmp_path: Path) -> None:
    (tmp_path / "door").symlink_to(root)  # a root itself may be a link
    for written in (tmp_path / "door", root):
        real = resolve_allowed(
            str(written / "model"), [tmp_path / "door"], field="model.directory", folder=True
        )
        assert real == (root / "model").resolve()
    gguf = resolve_allowed(str(root / "model.gguf"), [root], field="model.gguf_path", folder=False)
    assert gguf == (root / "model.gguf").resolve()


@pytest.mark.parametrize("path", ["/etc", "{root}/../secret", "{root}x/model"])
def test_resolve_allowed_refuses_a_path_outside_of_the_roots(root: Path, path: str) -> None:
    asked = path.format(root=root)
    with pytest.raises(InvalidArgument) as caught:
        resolve_allowed(asked, [root], field="model.directory", folder=True)
    assert caught.value.reason == Reason.PATH_NOT_ALLOWED
    assert (
        f"must lie below an allowed root ({root}) and not be reached by a symbolic link, got {asked!r}"
        in str(caught.value)
    )
    assert [violation.field for violation in caught.value.violations] == ["model.directory"]


def test_resolve_allowed_does_not_tell_whether_a_path_outside_exists(root: Path, tmp_path: Path) -> None:
    messages = []
    for name in ("secret", "nothing"):
        with pytest.raises(InvalidArgument) as caught:
            resolve_allowed(str(tmp_path / name), [root], field="model.directory", folder=True)
        messages.append(str(caught.value).replace(name, ""))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("target", ["secret", "root/model"])
def test_resolve_allowed_refuses_symbolic_links(root: Path, tmp_path: Path, target: str) -> None:
    (root / "link").symlink_to(tmp_path / target)
    for path in ("link", "link/config.json"):
        with pytest.raises(InvalidArgument) as caught:
            resolve_allowed(str(root / path), [root], field="model.directory", folder=True)
        assert caught.value.reason == Reason.PATH_NOT_ALLOWED
    (root / "model" / "model.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(InvalidArgument, match=r"model\.safetensors") as caught:
        resolve_allowed(str(root / "model"), [root], field="model.directory", folder=True)
    assert caught.value.reason == Reason.PATH_NOT_ALLOWED


@pytest.mark.parametrize("behind", ["there", "not-there", "there/secret.gguf"])
def test_a_link_is_refused_alike_whatever_is_behind_it(root: Path, tmp_path: Path, behind: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "secret.gguf").write_bytes(b"GGUF")
    (root / "link").symlink_to(tmp_path / behind)
    for asked in (root / "link", root / "link" / "secret.gguf"):
        with pytest.raises(InvalidArgument) as caught:
            resolve_allowed(str(asked), [root], field="model.gguf_path", folder=False)
        assert caught.value.reason == Reason.PATH_NOT_ALLOWED
        assert f"got {str(asked)!r}" in caught.value.message


@pytest.mark.parametrize("below", ["", "luthier", "luthier/blobs"])
def test_resolve_allowed_refuses_what_lies_among_the_blobs_of_a_service(tmp_path: Path, below: str) -> None:
    """Who knows the digest of another project's model would be given it, wherever the root lies."""
    store = tmp_path / "disk" / "luthier"
    blob = store / "blobs" / "ab" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"GGUF")
    root = tmp_path / "disk" / below
    assert resolve_allowed(str(blob), [root], field="model.gguf_path", folder=False) == blob
    (store / MARK_NAME).write_text("training " + "a" * 32)
    for path, folder in ((blob, False), (blob.parent, True), (store / "blobs" / "none", False)):
        with pytest.raises(InvalidArgument) as caught:
            resolve_allowed(str(path), [root], field="model.gguf_path", folder=folder)
        assert caught.value.reason == Reason.PATH_NOT_ALLOWED


def failing(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """Have the system fail to open a name below a folder."""
    really = os.open

    def broken(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), name)
        return really(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", broken)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN])
def test_a_disk_that_does_not_answer_is_no_model_that_is_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number, "model.gguf")
    with pytest.raises(Unavailable, match="cannot be looked at just now"):
        resolve_allowed(str(root / "model.gguf"), [root], field="model.gguf_path", folder=False)


def test_what_may_not_be_read_is_told_from_what_is_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, errno.EACCES, "model.gguf")
    with pytest.raises(InvalidArgument, match=r"must be readable by the worker, got .*: Permission denied"):
        resolve_allowed(str(root / "model.gguf"), [root], field="model.gguf_path", folder=False)


@pytest.mark.parametrize("path", ["{root}/none", "{root}/mo\x00del", "{root}/" + "m" * 300])
def test_resolve_allowed_says_what_is_not_there(root: Path, path: str) -> None:
    asked = path.format(root=root)
    with pytest.raises(NotFound) as caught:
        resolve_allowed(asked, [root], field="model.directory", folder=True)
    assert f"model.directory: must exist on the worker's machine, got {asked!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("{root}/model.gguf", True, "must be a folder in transformers' layout"),
        ("{root}/model", False, "must be a GGUF file"),
    ],
)
def test_resolve_allowed_says_what_the_path_must_be(
    root: Path, path: str, folder: bool, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve_allowed(path.format(root=root), [root], field="model.directory", folder=folder)
    assert message in str(caught.value)
    assert caught.value.reason == Reason.INVALID_FIELD


@pytest.mark.parametrize("path", ["model", "", "root/model"])
def test_resolve_allowed_takes_no_path_from_where_it_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(root.parent)
    with pytest.raises(InvalidArgument) as caught:
        resolve_allowed(path, [root], field="model.directory", folder=True)
    assert caught.value.reason == Reason.PATH_NOT_ALLOWED


def worker_config(home: Path, **settings: str) -> WorkerConfig:
    named = {f"LUTHIER_{name.upper()}": value for name, value in settings.items()}
    return read(WorkerConfig, section="WORKER", environ={"LUTHIER_HOME": str(home), **named})


def test_a_workers_own_setting_wins_over_the_services_and_both_over_the_homes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, own, services = tmp_path / "home", tmp_path / "own", tmp_path / "services"
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    monkeypatch.delenv("LUTHIER_TRAINING_MODEL_ROOTS", raising=False)
    assert allowed_roots(worker_config(home)) == (home / "models",)
    assert (home / "models").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("LUTHIER_TRAINING_MODEL_ROOTS", str(services))
    monkeypatch.setenv("LUTHIER_TRAINING_LEASE_SECONDS", "9")  # the service's, which the service reads
    assert allowed_roots(worker_config(home)) == (services,)
    assert allowed_roots(worker_config(home, worker_model_roots=f"{own},{services}")) == (own, services)
    assert not own.exists(), "what somebody names is not made"


@pytest.mark.parametrize("service", ["DATA", "TRAINING", "EVALUATION"])
def test_a_workers_root_holds_no_state_of_a_service_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    monkeypatch.setenv(f"LUTHIER_{service}_BLOBS_URL", f"file://{tmp_path}/disk/luthier/blobs")
    monkeypatch.setenv("LUTHIER_WORKER_MODEL_ROOTS", f"{tmp_path}/disk")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    with pytest.raises(InvalidArgument, match="LUTHIER_WORKER_MODEL_ROOTS must name folders") as caught:
        allowed_roots(read(WorkerConfig, section="WORKER"))
    assert f"{tmp_path}/disk/luthier/blobs is there" in caught.value.message


@pytest.mark.parametrize("setting", ["LUTHIER_WORKER_MODEL_ROOTS", "LUTHIER_TRAINING_MODEL_ROOTS"])
def test_a_workers_root_holds_no_keys_of_its_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setenv(setting, str(tmp_path))
    with pytest.raises(InvalidArgument, match=f"{setting} must name folders") as caught:
        allowed_roots(read(WorkerConfig, section="WORKER"))
    assert f"got {tmp_path}; put models into {tmp_path / 'models'}" in caught.value.message
