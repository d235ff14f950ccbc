"""Keys of some projects and roles: granted, read, refused when what stands there cannot be meant."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.work.hosted import serve

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


def test_a_home_that_is_not_there_or_another_users_gets_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FailedPrecondition, match=r"must be a home of services at .*/none"):
        grant_key(tmp_path / "none", "k", ["a"], ["reader"])
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(
        FailedPrecondition, match=f"belongs to user {user}, .*sudo -u '#{user}' env LUTHIER_HOME="
    ):
        grant_key(tmp_path, "k", ["a"], ["reader"])
    assert list(tmp_path.iterdir()) == []


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.write_text("")
    path.chmod(0o600)
    opened = os.open

    def refuse(name: Path, *rest: int, **options: int) -> int:
        # The tests may run as root, to whom no file is closed.
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return opened(name, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    return f"may read.*Permission denied.*belongs to user {os.geteuid()}"


def linked(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.symlink_to(path.with_name("elsewhere.toml"))
    return "it is a symbolic link"


def of_no_text(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    return "a file of text"


@pytest.mark.parametrize("spoil", [unreadable, linked, of_no_text])
async def test_a_service_whose_granted_keys_cannot_be_read_says_so_before_it_changes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path, pytest.MonkeyPatch], str]
) -> None:
    path = tmp_path / GRANTED_FILE
    said = spoil(path, monkeypatch)
    with pytest.raises(FailedPrecondition, match=said) as caught:
        async with serve(tmp_path):
            pass
    assert str(path) in caught.value.message
    assert not (tmp_path / "small").exists()
    with pytest.raises(FailedPrecondition, match=said):
        grant_key(tmp_path, "k", ["a"], ["reader"])


async def test_a_service_says_which_keys_are_of_projects_that_it_does_not_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grant_key(tmp_path, "some", ["p", "gone"], ["reader"])
    grant_key(tmp_path, "every", ["*"], ["reader"])
    async with serve(tmp_path):
        pass
    (line,) = [one.getMessage() for one in caplog.records if "not served" in one.getMessage()]
    assert line == "the key some is of projects that are not served: gone; LUTHIER_PROJECTS says which are"


def test_processes_that_grant_at_once_lose_no_key(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from luthier.runtime.granted_keys import grant_key\n"
        "sys.stdin.read()\n"
        "for n in range(20): grant_key(Path(sys.argv[1]), f'{sys.argv[2]}-{n}', ['a'], ['reader'])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    names = [f"k{number}" for number in range(4)]
    running = [subprocess.Popen([*command, name], stdin=subprocess.PIPE) for name in names]
    for one in running:
        assert one.stdin is not None
        one.stdin.close()
    assert [one.wait(60) for one in running] == [0] * len(names)
    wanted = {f"{name}-{number}" for name in names for number in range(20)}
    assert {one.name for one in read_granted(tmp_path)} == wanted


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "").chmod(0o644)
    with pytest.raises(FailedPrecondition, match="chmod 600"):
        read_granted(tmp_path)
