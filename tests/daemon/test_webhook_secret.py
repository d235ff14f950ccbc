"""`luthierd webhook-secret` prints what a receiver verifies with."""

from __future__ import annotations

import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from standardwebhooks import Webhook
from tests.daemon.copies import Copies
from tests.daemon.test_luthierd import environment

from luthier.work.webhooks.signing import SECRET_FILE, secrets_of, signed_headers

URL = "https://hooks.example.com/luthier"


Printed = Callable[..., subprocess.CompletedProcess[str]]
"""Runs the command with a home, a URL and more."""


@pytest.fixture
def printed(programs: Copies) -> Printed:
    def run(home: Path, url: str, *more: str) -> subprocess.CompletedProcess[str]:
        return programs.run("luthier.daemon", "webhook-secret", url, *more, environment=environment(home))

    return run


def test_the_secret_verifies_what_is_sent_there_on_any_path(tmp_path: Path, printed: Printed) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    first, other = printed(home, URL), printed(home, "https://hooks.example.com:443/other")
    assert first.returncode == 0, first.stderr
    assert first.stdout == other.stdout, "it is the host's, and the file is made once"
    assert printed(home, "https://elsewhere.example/").stdout != first.stdout
    theirs = printed(home, URL, "--project", "team").stdout
    assert theirs == "\n".join(secrets_of(home / SECRET_FILE, "https://hooks.example.com:443", "team")) + "\n"
    assert theirs != first.stdout, "one project does not sign for another"
    assert stat.S_IMODE((home / SECRET_FILE).stat().st_mode) == 0o600
    headers = signed_headers(
        secrets_of(home / SECRET_FILE, "https://hooks.example.com:443", "default"),
        "msg_1",
        int(time.time()),
        b"{}",
    )
    assert Webhook(first.stdout.strip()).verify(b"{}", dict(headers)) == {}


def test_what_is_no_url_is_refused(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    done = printed(tmp_path / "home", "hooks.example.com")
    assert done.returncode == 1
    assert done.stderr.startswith("error: URL must be https://host")


def test_what_is_no_project_is_refused(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    done = printed(tmp_path / "home", URL, "--project", "a/b")
    assert done.returncode == 1
    assert "--project" in done.stderr
    assert "projects/a/b" in done.stderr
