"""The home is its owner's alone; metrics that everybody can read are said loudly."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import FailedPrecondition
from luthier.runtime.addresses import is_loopback
from luthier.runtime.home import secure_home
from luthier.runtime.metrics import MetricsServer


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_home_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    assert secure_home(tmp_path / "deep" / "home") == []
    assert mode(tmp_path / "deep" / "home") == 0o700


def test_a_home_that_others_may_read_is_tightened_and_that_is_said(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for path in (home, home / "data", home / "logs", home / "data" / "blobs"):
        path.mkdir()
        path.chmod(0o755)
    files = [home / "data" / name for name in ("data.db", "data.db-wal", "data.db-shm")]
    for path in files:
        path.touch()
        path.chmod(0o644)
    said = secure_home(home)
    assert [mode(path) for path in (home, home / "data", home / "logs")] == [0o700] * 3
    assert [mode(path) for path in files] == [0o600] * 3
    assert len(said) == 6
    assert said[0] == f"{home} had mode 0755, others could get at it: now 0700"
    assert secure_home(home) == []


def test_a_home_where_everybody_may_write_is_refused_and_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for wide in (0o1777, 0o777):
        shared.chmod(wide)
        with pytest.raises(FailedPrecondition, match="everybody may write there") as caught:
            secure_home(shared)
        assert "set LUTHIER_HOME to another folder" in caught.value.message
        assert mode(shared) == wide


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_home_of_another_user_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    os.chown(other, 12345, 12345)
    with pytest.raises(FailedPrecondition, match="it belongs to user 12345, not to 0"):
        secure_home(other)


def test_a_users_whole_home_directory_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tmp_path.chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    secure_home(tmp_path)
    assert mode(tmp_path) == 0o755
    assert mode(tmp_path / "data") == 0o700


def test_what_a_private_process_creates_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from sqlalchemy import text\n"
        "from luthier.runtime.home import keep_private\n"
        "from luthier.storage.database import Database\n"
        "from luthier.storage.local_blobs import LocalBlobStore\n"
        "from luthier.storage.local_staging import LocalStaging\n"
        "async def main(root):\n"
        "    keep_private()\n"
        "    database = Database(f'sqlite+aiosqlite:///{root}/state/a.db')\n"
        "    async with database.transaction() as connection:\n"
        "        await connection.execute(text('CREATE TABLE t (a)'))\n"
        "    blobs = LocalBlobStore(root / 'blobs')\n"
        "    await blobs.put_bytes(b'abc')\n"
        "    staging = LocalStaging(root / 'blobs' / 'staging', blobs)\n"
        "    await staging.append('k', 0, b'abc')\n"
        "    for path in sorted(root.rglob('*')):\n"
        "        print(oct(path.stat().st_mode & 0o777), path.is_dir(), path.name)\n"
        "    await database.close()\n"
        "asyncio.run(main(pathlib.Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], umask=0, capture_output=True, text=True, check=True
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert {"a.db", "a.db-wal", "a.db-shm", "blobs", "staging"} <= {name for _, _, name in found}
    assert len(found) > 8
    assert {(bits, folder) for bits, folder, _ in found} == {("0o700", "True"), ("0o600", "False")}


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_is_loopback_of_an_address_that_others_reach_is_false(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


async def test_metrics_that_others_can_read_are_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "luthier.runtime.metrics"):
        async with MetricsServer("127.0.0.1:0").serving():
            assert caplog.messages == []
        async with MetricsServer("0.0.0.0:0").serving() as port:
            assert caplog.messages == [
                f"metrics are served without a key to everybody who reaches 0.0.0.0:{port}; "
                "bind them to loopback, or keep others away with a firewall"
            ]
