"""Limited forks: what comes back of them, what ends them, and that they have nothing of what their parent has open."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.work.test_limited import gone, wait_for

from luthier.errors import Cancelled, InvalidArgument, Reason, Unavailable
from luthier.work.limited import LimitReached, ProcessBroken, ProcessKilled
from luthier.work.limited_child import Limits
from luthier.work.limited_fork import in_fork

LIMITS = Limits(cpu_seconds=1, memory_bytes=256 << 20, wall_seconds=20.0)


def spin() -> dict[str, Any]:
    while True:
        pass


def wait() -> dict[str, Any]:
    time.sleep(60)
    return {}


def refuse() -> dict[str, Any]:
    raise InvalidArgument("not this", reason=Reason.MODEL_INVALID, metadata={"line": "3"})


def fail() -> dict[str, Any]:
    raise KeyError("no entry")


def kill_itself() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_work_is_done_in_another_process_that_may_write_and_its_values_come_back(tmp_path: Path) -> None:
    text = "héllo \ud800 \U0001f600"

    def work() -> dict[str, Any]:
        (tmp_path / "written").write_text("by it")
        return {"pid": os.getpid(), "parent": os.getppid(), "text": text, "ids": (1, 2)}

    answer = in_fork(work, LIMITS)
    pid = answer.pop("pid")
    assert answer == {"parent": os.getpid(), "text": text, "ids": [1, 2]}
    assert (tmp_path / "written").read_text() == "by it"
    assert pid != os.getpid()
    assert not Path(f"/proc/{pid}").exists(), "it is gone, and reaped"


def test_the_tokenizers_library_is_told_to_use_no_threads() -> None:
    def work() -> dict[str, Any]:
        get = ctypes.CDLL(None).getenv
        get.restype = ctypes.c_char_p
        return {"said": get(b"TOKENIZERS_PARALLELISM").decode()}

    assert in_fork(work, LIMITS) == {"said": "false"}


def test_an_error_of_ours_comes_back_as_it_was() -> None:
    with pytest.raises(InvalidArgument, match="not this") as caught:
        in_fork(refuse, LIMITS)
    assert (caught.value.reason, caught.value.metadata) == (Reason.MODEL_INVALID, {"line": "3"})


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (spin, "1 s of CPU time"),
        (lambda: {"size": len(bytearray(1 << 30))}, "256 MiB of memory"),
        (lambda: {"text": "x" * (65 << 20)}, "64 MiB for its answer"),
    ],
)
def test_work_that_takes_too_much_ends_with_its_process(
    work: Callable[[], dict[str, Any]], said: str
) -> None:
    with pytest.raises(LimitReached, match=said):
        in_fork(work, LIMITS)


def test_work_that_takes_too_long_or_that_nobody_wants_ends_with_its_process(tmp_path: Path) -> None:
    with pytest.raises(LimitReached, match=r"^0\.5 s$"):
        in_fork(wait, replace(LIMITS, wall_seconds=0.5))

    def told() -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        return wait()

    def check() -> None:
        if (tmp_path / "pid").exists():
            raise Cancelled("stopped")

    began = time.monotonic()
    with pytest.raises(Cancelled, match="stopped"):
        in_fork(told, LIMITS, check)
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_work_that_fails_unforeseen_or_is_killed_says_so() -> None:
    with pytest.raises(ProcessBroken, match="KeyError: 'no entry'"):
        in_fork(fail, LIMITS)
    with pytest.raises(ProcessBroken, match="code 7"):
        in_fork(lambda: os._exit(7), LIMITS)
    with pytest.raises(ProcessKilled):
        in_fork(kill_itself, LIMITS)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOMEM, MemoryError), (errno.EAGAIN, Unavailable)], ids=["memory", "number"]
)
def test_a_fork_that_there_can_not_be_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refused() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", refused)
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(kind, match=f"could not be forked: .*{os.strerror(number)}") as caught:
        in_fork(refuse, LIMITS)
    assert getattr(caught.value, "reason", Reason.CRASHED) == Reason.CRASHED
    assert os.listdir("/proc/self/fd") == open_before


def test_a_fork_keeps_nothing_open_of_what_its_parent_has() -> None:
    """Whoever listens at the other end of a line hears its end; and who owns a number in the fork can close it."""
    ours, theirs = socket.socketpair()

    def work() -> dict[str, Any]:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        theirs.close()
        return {"sockets": sum(link.startswith("socket:") for link in links)}

    with ours, theirs:
        assert in_fork(work, LIMITS) == {"sockets": 1}, "its own line alone"
        ours.sendall(b"still open here")
        assert theirs.recv(64) == b"still open here"


@contextmanager
def logging_all_the_time() -> Iterator[logging.Logger]:
    """Hold the lock of a logger's handler almost all the time, in another thread."""
    stopping = threading.Event()
    holding = threading.Event()
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.Logger("busy")
    logger.addHandler(handler)

    def write() -> None:
        while not stopping.is_set():
            with handler.lock or threading.Lock():
                logger.warning("x" * 100)
                holding.set()
                stopping.wait(0.01)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert holding.wait(10.0)
        yield logger
    finally:
        stopping.set()
        thread.join()


def test_a_fork_hangs_by_no_lock_that_another_thread_held() -> None:
    with logging_all_the_time() as logger:

        def work() -> dict[str, Any]:
            logger.warning("it says something")
            return {"said": True}

        for _ in range(5):
            assert in_fork(work, replace(LIMITS, wall_seconds=10.0)) == {"said": True}


PARENT = """
import os, sys, threading, time
from pathlib import Path
from luthier.work.limited_child import Limits
from luthier.work.limited_fork import in_fork

def work():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    while True:
        pass

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
in_fork(work, Limits())
"""


def test_a_fork_ends_within_a_second_of_its_parents_kill(tmp_path: Path) -> None:
    """Busy, so that it does not notice the end of its connection by itself."""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    place = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(place)], env=environment) as parent:
        wait_for(lambda: place.exists() and bool(place.read_text()), 20)
        fork = int(place.read_text())
        assert not gone(fork)
        parent.kill()
        parent.wait()
        assert wait_for(lambda: gone(fork), 5) < 1
