"""Paths of base models: below the roots, and no symbolic link on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.training.models.sources import resolve_allowed


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
        assert caught.value.reason in (Reason.PATH_NOT_ALLOWED, Reason.INVALID_FIELD)
    with pytest.raises(InvalidArgument) as caught:
        resolve_allowed(str(root / "link"), [root], field="model.directory", folder=True)
    assert caught.value.reason == Reason.PATH_NOT_ALLOWED
    (root / "model" / "model.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(InvalidArgument, match=r"model\.safetensors") as caught:
        resolve_allowed(str(root / "model"), [root], field="model.directory", folder=True)
    assert caught.value.reason == Reason.PATH_NOT_ALLOWED


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("{root}/none", True, "must exist on the worker's machine, got '{root}/none'"),
        ("model", True, "must be an absolute path, got 'model'"),
        ("{root}/model.gguf", True, "must be a folder in transformers' layout"),
        ("{root}/model", False, "must be a GGUF file"),
        ("", True, "must be an absolute path, got ''"),
        ("{root}/mo\x00del", True, "must have no control characters, got '{root}/mo\\x00del'"),
        ("{root}/\x1b[31mmodel", False, "must have no control characters"),
        ("{root}/" + "m" * 5000, True, "must have at most 4096 bytes"),
        ("{root}/" + "m" * 300, True, "must exist on the worker's machine"),
    ],
)
def test_resolve_allowed_says_what_the_path_must_be(
    root: Path, path: str, folder: bool, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve_allowed(path.format(root=root), [root], field="model.directory", folder=folder)
    assert message.format(root=root) in str(caught.value)
    assert caught.value.reason == Reason.INVALID_FIELD
