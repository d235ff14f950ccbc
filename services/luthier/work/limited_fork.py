"""A limited process that is forked: it has at once what this one took seconds to import, and runs what nobody has read.

For a process that is a child itself, with no gRPC and no device: what survives no fork is other threads, with the
locks that they hold. Those of Python, of its logging and of the C library are let go of by themselves; what else its
threads might hold, torch's first of all, the work must not touch.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NoReturn

from luthier.work.forking import no_fork
from luthier.work.limited import Check, LimitedProcess
from luthier.work.limited_child import Limits, answer_requests

_LOOK_SECONDS = 0.001


def in_fork(
    work: Callable[[], Mapping[str, Any]], limits: Limits, check: Check = lambda: None
) -> dict[str, Any]:
    """Return what work returns, JSON values, that runs in a fork of this process under limits; it may write files.

    The thread that calls waits, and calls `check` ten times a second; what that raises ends the fork, and so does
    this process's own end. Of what is open here the fork keeps nothing: it says nothing to anybody.

    Raises:
        LimitReached, ProcessBroken, ProcessKilled: as `LimitedProcess.call`.
        LuthierError: what the work raised.
        MemoryError: there was none for another process.
        Unavailable: CRASHED; there could be no other process, as where a limit of their number is reached.
    """
    with closing(_forked(work, limits)) as process:
        return process.call({}, check=check)


def _forked(work: Callable[[], Mapping[str, Any]], limits: Limits) -> LimitedProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        parent = os.getpid()
        try:
            with warnings.catch_warnings():
                # Python 3.12 and later warn of any other thread; this module's first lines say why there may be some.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            ours.close()
            refusal = no_fork(str(error))
            raise MemoryError(refusal.message) if error.errno == errno.ENOMEM else refusal from error
        if not pid:
            _answer(work, theirs, parent, limits)
    return LimitedProcess(_Forked(pid), ours, limits)


def _answer(
    work: Callable[[], Mapping[str, Any]], connection: socket.socket, parent: int, limits: Limits
) -> NoReturn:
    """Do the work in a new process, and end that without what libraries and callers do at an end."""
    status = 1
    try:
        _let_go_but(connection.fileno())
        # A library of Rust, which asks the C library for it whenever it would use threads.
        os.putenv("TOKENIZERS_PARALLELISM", "false")
        gc.freeze()  # what is searched for garbage is copied
        answer_requests(lambda *_: work(), connection, parent, limits, writes_files=True)
        status = 0
    finally:
        os._exit(status)


def _let_go_but(kept: int) -> None:
    """Put nothing in the place of all that the parent has open, so that it can still be closed by whoever owns it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, kept, nothing):
            os.dup2(nothing, int(name), inheritable=False)


class _Forked:
    """A fork of this process, as `subprocess.Popen` has others. For one thread.

    Args:
        pid: its number.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code; a signal's number, negative, where one ended it; None: it goes on."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float) -> int:
        """Return its exit code as soon as it has ended. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(_LOOK_SECONDS)
        return code

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
