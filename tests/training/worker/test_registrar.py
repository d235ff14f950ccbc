"""Registrations in processes of their own: they hang and die alone, and change nothing in the worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import Cancelled, Internal, InvalidArgument, NotFound, Unavailable
from luthier.lm.sources import DirectorySource
from luthier.training.worker.registrar import Registrar

# Does what the name of the source says, with nothing imported that takes long.
CHILD = """
import os, signal, sys, time
from luthier.errors import InvalidArgument
from luthier.training.worker.register_child import serve
from luthier.training.worker.registrar import Made

def work(order):
    (order.scratch / "pid").write_text(str(os.getpid()))
    if order.source == "hang":
        os.mkfifo(order.scratch / "x.index.json")
        open(order.scratch / "x.index.json").read()
    elif order.source == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif order.source == "full":
        raise MemoryError("12 GB")
    elif order.source == "odd":
        raise KeyError("surprise")
    elif order.source == "bad":
        raise InvalidArgument("no model", reason="MODEL_INVALID")
    elif order.source == "compute":
        end = time.monotonic() + 4
        while time.monotonic() < end:
            sum(range(1000))
    return Made(files=[order.source, os.getpid(), order.num_threads])

serve(int(sys.argv[1]), work)
"""


@pytest.fixture
def registrar(tmp_path: Path) -> Registrar:
    (tmp_path / "child.py").write_text(CHILD)
    return Registrar(num_threads=3, stall_seconds=1.5, child=("-P", str(tmp_path / "child.py")))


@pytest.fixture
def attempt(registrar: Registrar, tmp_path: Path) -> Callable[..., Any]:
    def run(what: str, check: Callable[[], None] = lambda: None) -> Any:
        scratch = tmp_path / what
        scratch.mkdir()
        return registrar.register(what, scratch / "out", scratch, check)  # type: ignore[arg-type]

    return run


def pid_of(scratch: Path) -> int:
    return int((scratch / "pid").read_text())


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_registration_is_made_in_another_process(attempt: Callable[..., Any]) -> None:
    what, pid, num_threads = attempt("fine")
    assert (what, num_threads) == ("fine", 3)
    assert pid != os.getpid()


def test_what_hangs_is_ended_and_another_beside_it_goes_on(
    attempt: Callable[..., Any], tmp_path: Path
) -> None:
    made: list[Any] = []
    beside = threading.Thread(target=lambda: made.append(attempt("compute")))
    beside.start()
    with pytest.raises(Unavailable, match=r"stood still for 1\.5 s and was ended") as caught:
        attempt("hang")
    assert caught.value.reason == "STALLED"
    assert not runs(pid_of(tmp_path / "hang"))
    beside.join()
    assert made[0][0] == "compute", "it computes for longer than it may stand still"


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("die", Unavailable, "ended with code -11"),
        ("full", MemoryError, "12 GB"),
        ("odd", Internal, "KeyError: 'surprise'"),
        ("bad", InvalidArgument, "no model"),
    ],
)
def test_how_it_ends_is_told(
    attempt: Callable[..., Any], what: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        attempt(what)


def test_a_registration_that_nobody_wants_any_more_is_ended(
    attempt: Callable[..., Any], tmp_path: Path
) -> None:
    def check() -> None:
        if (tmp_path / "hang" / "x.index.json").exists():
            raise Cancelled("asked to stop")

    with pytest.raises(Cancelled):
        attempt("hang", check)
    assert not runs(pid_of(tmp_path / "hang"))


def test_no_registration_outlives_a_worker_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    worker = f"""
from pathlib import Path
from luthier.training.worker.registrar import Registrar
folder = Path({str(tmp_path)!r})
registrar = Registrar(child=("-P", str(folder / "child.py")))
registrar.register("hang", folder / "out", folder, lambda: None)
"""
    with subprocess.Popen([sys.executable, "-c", worker]) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "x.index.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    child = pid_of(tmp_path)
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


def test_the_real_child_says_what_is_wrong_with_a_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"must hold config\.json"):
        Registrar().register(
            DirectorySource(path=tmp_path / "empty"), tmp_path / "out", tmp_path, lambda: None
        )
