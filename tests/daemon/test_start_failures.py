"""What cannot start says why in one line, without a trace, and ends with a status that is not zero."""

from __future__ import annotations

import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests import stores
from tests.daemon.copies import Copies
from tests.daemon.test_luthierd import environment

from luthier.data import schema as data_schema
from luthier.storage.migrations import upgrade
from luthier.work import schema as work_schema

Prepare = Callable[[Path, dict[str, str]], str]
"""Makes a home, and settings in place, with which nothing can start; returns what must be said."""


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why; logs are lines of JSON."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def unknown_blobs(_: Path, settings: dict[str, str]) -> str:
    settings["LUTHIER_DATA_BLOBS_URL"] = "s3://bucket/prefix"
    return "blob store URL must be file:///path/of/a/folder, got one of the scheme 's3'"


def unknown_database(_: Path, settings: dict[str, str]) -> str:
    settings["LUTHIER_DATA_DATABASE_URL"] = "postgresql+psycopg://u:secret@h/d"
    said = (
        "database URL must be sqlite+aiosqlite:////path/of/a/file, got one of the scheme 'postgresql+psycopg'"
    )
    return re.escape(said)


def no_folder_of_blobs(home: Path, settings: dict[str, str]) -> str:
    (home / "file").write_text("not a folder")
    settings["LUTHIER_DATA_BLOBS_URL"] = f"file://{home}/file/blobs"
    return f"{home}/file/blobs must be a folder that user"


def no_folder_of_the_database(home: Path, settings: dict[str, str]) -> str:
    (home / "file").write_text("not a folder")
    settings["LUTHIER_DATA_DATABASE_URL"] = f"sqlite+aiosqlite:///{home}/file/a.db"
    return f"{home}/file must be a folder that user"


def linked_key(home: Path, _: dict[str, str]) -> str:
    (home / "elsewhere").write_text("lk_x\n")
    (home / "api-key").symlink_to(home / "elsewhere")
    return f"{home}/api-key must be a file of text"


def shared_key(home: Path, _: dict[str, str]) -> str:
    (home / "worker-key").write_text("lw_x\n")
    (home / "worker-key").chmod(0o644)
    return f"{home}/worker-key"


def home_that_is_a_file(home: Path, settings: dict[str, str]) -> str:
    (home / "file").write_text("not a folder")
    settings["LUTHIER_HOME"] = str(home / "file")
    return f"the home must be a folder that user .* may make, got {home}/file: .*; set LUTHIER_HOME"


def newer_schema(home: Path, _: dict[str, str]) -> str:
    path = stores.service_file(home, "data")
    upgrade(f"sqlite+aiosqlite:///{path}", [work_schema.MIGRATIONS, data_schema.MIGRATIONS])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO alembic_version VALUES ('data_9999')")
    return f"{path} was migrated by newer code: it holds revision data_9999; start that newer version"


def no_database(home: Path, _: dict[str, str]) -> str:
    path = stores.service_file(home, "data")
    path.parent.mkdir(exist_ok=True)
    path.write_text("this is a letter, and long enough to be looked at as a file of SQLite" * 20)
    return f"{path} must be a database of ours that user .*: file is not a database"


def unknown_level(_: Path, settings: dict[str, str]) -> str:
    settings["LUTHIER_LOG_LEVEL"] = "LOUD"
    return "LUTHIER_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got 'LOUD'"


def metrics_nowhere(_: Path, settings: dict[str, str]) -> str:
    settings["LUTHIER_DATA_METRICS_ADDRESS"] = "here:http"
    return r"an address of metrics must be host:port, e\.g\. 127.0.0.1:9601, got 'here:http'"


@pytest.mark.parametrize(
    "prepare",
    [
        unknown_blobs,
        unknown_database,
        no_folder_of_blobs,
        no_folder_of_the_database,
        linked_key,
        shared_key,
        home_that_is_a_file,
        newer_schema,
        no_database,
        unknown_level,
        metrics_nowhere,
    ],
)
def test_a_service_that_cannot_start_says_why_in_a_line(
    tmp_path: Path, programs: Copies, prepare: Prepare
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    settings = environment(home)
    expected = prepare(home, settings)
    line = said(programs.run("luthier.data", environment=settings))
    assert "secret" not in line
    assert re.search(expected, line), line


def test_a_url_that_nobody_knows_is_refused_before_a_database_is_made(
    tmp_path: Path, programs: Copies
) -> None:
    home = tmp_path / "home"
    settings = environment(home, LUTHIER_DATA_BLOBS_URL="s3://bucket/prefix")
    said(programs.run("luthier.data", environment=settings))
    assert not (home / "data" / "data.db").exists()


def test_two_services_on_one_folder_of_blobs_are_one_too_many(tmp_path: Path, programs: Copies) -> None:
    shared = f"file://{tmp_path}/blobs"
    urls = {"LUTHIER_DATA_BLOBS_URL": shared, "LUTHIER_TRAINING_BLOBS_URL": shared}
    settings = environment(tmp_path / "home", **urls)
    command = [sys.executable, "-m", "luthier.data"]
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as data:
        try:
            address = settings["LUTHIER_DATA_ADDRESS"].rpartition(":")
            _await_listening(address[0], int(address[2]))
            line = said(programs.run("luthier.training", environment=settings))
        finally:
            data.terminate()
    assert re.search(
        f"the blobs in {tmp_path}/blobs are those of the data service with database [0-9a-f]{{32}}, "
        "this is the training service, which would delete them: give each a folder of its own by "
        "LUTHIER_TRAINING_BLOBS_URL",
        line,
    )


def _await_listening(host: str, port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.1)


@pytest.mark.parametrize("kind", ["ADDRESS", "METRICS_ADDRESS"])
@pytest.mark.parametrize("service", ["data", "training", "evaluation"])
def test_a_service_whose_port_is_taken_says_so_in_a_line(
    tmp_path: Path, programs: Copies, service: str, kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        name = f"LUTHIER_{service.upper()}_{kind}"
        settings = environment(tmp_path / "home", **{name: address})
        line = said(programs.run(f"luthier.{service}", environment=settings))
    assert address in line
    assert "is the port taken?" in line


@pytest.mark.parametrize("service", ["data", "training", "evaluation"])
def test_a_worker_that_cannot_start_says_why_in_a_line(tmp_path: Path, service: str) -> None:
    settings = environment(tmp_path / "home", LUTHIER_WORKER_CACHE_BYTES="much")
    command = [sys.executable, "-m", f"luthier.{service}.worker"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=120)
    assert "LUTHIER_WORKER_CACHE_BYTES must be" in said(done)
