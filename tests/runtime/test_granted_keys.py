"""Keys of some projects and roles: granted, read, refused when what stands there cannot be meant."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from luthier.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated
from luthier.runtime.auth import Authenticator
from luthier.runtime.granted_keys import GRANTED_FILE, KEY_ROLES, GrantedKey, grant_key, read_granted
from luthier.runtime.keys import read_or_create_keys

DIGEST = "0" * 64


def write(home: Path, text: str) -> Path:
    path = home / GRANTED_FILE
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_granted_key_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    assert read_granted(tmp_path) == ()
    key = grant_key(tmp_path, "reporting", ["b", "a"], ["reader"])
    other = grant_key(tmp_path, "ingest", ["*"], ["writer", "reader"])
    path = tmp_path / GRANTED_FILE
    assert key not in path.read_text()
    assert other not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [GRANTED_FILE], "nothing is left aside"
    assert read_granted(tmp_path) == (
        GrantedKey(
            name="reporting",
            digest=hashlib.sha256(key.encode()).digest(),
            projects=frozenset({"a", "b"}),
            roles=frozenset({"reader"}),
        ),
        GrantedKey(
            name="ingest",
            digest=hashlib.sha256(other.encode()).digest(),
            projects=frozenset({"*"}),
            roles=frozenset({"reader", "writer"}),
        ),
    )


def test_what_the_operator_wrote_stays_as_it_was(tmp_path: Path) -> None:
    written = f'# ours\n[old]\nsha256 = "{DIGEST}"\nprojects = ["a"]\nroles = ["reader"]\n'
    path = write(tmp_path, written)
    grant_key(tmp_path, "new", ["a"], ["reader"])
    assert path.read_text().startswith(written)
    assert [one.name for one in read_granted(tmp_path)] == ["old", "new"]


def test_a_granted_key_has_its_roles_and_those_of_its_projects_that_are_served(tmp_path: Path) -> None:
    key = grant_key(tmp_path, "some", ["a", "gone"], ["reader"])
    every = grant_key(tmp_path, "every", ["*"], ["writer"])
    keys = read_or_create_keys(tmp_path)
    served = Authenticator(keys, projects=("a", "b"), granted=read_granted(tmp_path))
    found = served.authenticate(f"Bearer {key}")
    assert (found.kind, str(found), found.roles) == ("key", "key:some", frozenset({"reader"}))
    assert found.projects == frozenset({"a"})
    assert served.authenticate(f"Bearer {every}").projects == frozenset({"a", "b"})
    whole = served.authenticate(f"Bearer {keys.api_key}")
    assert (whole.roles, whole.projects) == (KEY_ROLES, frozenset({"a", "b"}))
    with pytest.raises(Unauthenticated, match="not known"):
        Authenticator(keys, projects=("a", "b")).authenticate(f"Bearer {key}")


@pytest.mark.parametrize(
    ("name", "projects", "roles", "said"),
    [
        ("Bad", ["a"], ["reader"], "the name of a key must be 1 to 63 lowercase letters.*got 'Bad'"),
        ("k", ["a"], ["owner"], "k.roles must be among generator, reader, writer, got 'owner'"),
        ("k", ["a"], [], r"k.roles must be a list of one text or more, got \[\]"),
        ("k", [], ["reader"], r"k.projects must be a list of one text or more, got \[\]"),
        ("k", ["a/b"], ["reader"], "k.projects must be 1 to 63 lowercase letters.*got 'a/b'"),
        ("k", ["*", "a"], ["reader"], r"k.projects must be .*got '\*'"),
    ],
)
def test_what_cannot_be_granted_is_refused_and_writes_nothing(
    tmp_path: Path, name: str, projects: list[str], roles: list[str], said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said):
        grant_key(tmp_path, name, projects, roles)
    assert list(tmp_path.iterdir()) == []


def test_a_name_has_one_key(tmp_path: Path) -> None:
    grant_key(tmp_path, "one", ["a"], ["reader"])
    before = (tmp_path / GRANTED_FILE).read_text()
    with pytest.raises(AlreadyExists, match="has a key one already; take another name"):
        grant_key(tmp_path, "one", ["b"], ["writer"])
    assert (tmp_path / GRANTED_FILE).read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[k", "must be TOML"),
        ("k = 1", "k must be a table of sha256, projects, roles, got 1"),
        ('[k]\nsha256 = "x"\nprojects = ["a"]\n', "k must be a table of sha256, projects, roles, got"),
        (
            f'[k]\nsha256 = "{DIGEST}"\nprojects = ["a"]\nroles = ["reader"]\nrole = 1\n',
            "k must be a table of sha256, projects, roles, got",
        ),
        ('[k]\nsha256 = "x"\nprojects = ["a"]\nroles = ["reader"]\n', "must be the key's sha256 in 64 hex"),
        (f'[k]\nsha256 = "{DIGEST}"\nprojects = "a"\nroles = ["reader"]\n', "k.projects must be a list"),
        (f'[k]\nsha256 = "{DIGEST}"\nprojects = [1]\nroles = ["reader"]\n', "k.projects must be a list"),
        (
            f'[k]\nsha256 = "{DIGEST}"\nprojects = ["a"]\nroles = ["reader"]\n'
            f'[l]\nsha256 = "{DIGEST}"\nprojects = ["a"]\nroles = ["reader"]\n',
            f"sha256 {DIGEST} stands twice",
        ),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_its_path(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument, match=said) as caught:
        read_granted(tmp_path)
    assert str(path) in caught.value.message


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "").chmod(0o644)
    with pytest.raises(FailedPrecondition, match="chmod 600"):
        read_granted(tmp_path)
