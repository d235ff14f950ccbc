"""`luthierd grant-key` makes a key that services know."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.daemon.copies import Copies
from tests.daemon.test_luthierd import environment

from luthier.runtime.auth import Authenticator
from luthier.runtime.granted_keys import GRANTED_FILE, read_granted
from luthier.runtime.keys import read_or_create_keys


def granted(programs: Copies, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run("luthier.daemon", "grant-key", *arguments, environment=environment(home))


def test_the_printed_key_has_its_projects_and_roles(tmp_path: Path, programs: Copies) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    wanted = ("--project", "a", "--project", "b", "--role", "reader", "--role", "generator")
    done = granted(programs, home, "chat", *wanted)
    assert done.returncode == 0, done.stderr
    keys = read_or_create_keys(home)
    known = Authenticator(keys, projects=("a", "b", "c"), granted=read_granted(home))
    found = known.authenticate(f"Bearer {done.stdout.strip()}")
    assert (str(found), found.projects) == ("key:chat", frozenset({"a", "b"}))
    assert found.roles == frozenset({"reader", "generator"})
    again = granted(programs, home, "chat", "--project", "a", "--role", "reader")
    assert (again.returncode, again.stdout) == (1, "")
    assert "has a key chat already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("chat", "--project", "a", "--role", "owner"), "roles must be among generator, reader, writer"),
        (("chat", "--project", "a/b", "--role", "reader"), "projects must be 1 to 63 lowercase letters"),
        (("Chat", "--project", "a", "--role", "reader"), "the name of a key must be"),
        (("chat", "--role", "reader"), "--project"),
    ],
)
def test_what_cannot_be_granted_is_said_and_nothing_is_written(
    tmp_path: Path, programs: Copies, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    done = granted(programs, tmp_path / "home", *arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert not (tmp_path / "home" / GRANTED_FILE).exists()
