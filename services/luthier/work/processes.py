"""Processes of ours that lead a group: their ends are known, and brought about with all that they started."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_END_SECONDS = 10.0
_LOOK_SECONDS = 0.005
_logger = logging.getLogger(__name__)


class Process:
    """A child of this process that leads a group. For any thread.

    Until `end` its number stays its own, also when it has ended by itself.

    Args:
        pid: its number, and its group's.
        reap: lets the kernel forget it, once it has ended.
    """

    def __init__(self, pid: int, reap: Callable[[], object]) -> None:
        self.pid = pid
        self._reap = reap
        self._code: int | None = None
        self._lock = threading.Lock()

    @property
    def code(self) -> int | None:
        """Its exit code; a signal's number, negative, where a signal ended it; None: it goes on."""
        with self._lock:
            if self._code is None:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None:
                    is_exit = found.si_code == os.CLD_EXITED
                    self._code = found.si_status if is_exit else -found.si_status
            return self._code

    def wait(self, seconds: float = _END_SECONDS) -> int | None:
        """Return its code as soon as it has ended; None: it goes on."""
        deadline = time.monotonic() + seconds
        while (code := self.code) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return code

    def end(self) -> None:
        """End it and its group, whatever they do. Call it once."""
        # One that has just begun does not lead its group yet; and the group of one that ended lives on.
        for kill in (os.kill, os.killpg):
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        if self.wait() is None:
            _logger.error("a killed process does not end: the kernel holds it", extra={"pid": self.pid})
            return
        self._reap()
        _reap_group(self.pid, time.monotonic() + _END_SECONDS)


def adopted(pid: int) -> Process:
    """Return a process that a descendant forked, once it is ours: that descendant ends just now.

    Raises:
        OSError: it is gone, or does not become ours.
    """
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            if not Path(f"/proc/{pid}").exists():
                raise
            time.sleep(_LOOK_SECONDS / 10)
            continue
        return Process(pid, lambda: os.waitpid(pid, 0))
    raise TimeoutError(f"process {pid} must become a child of this one, it does not")


def _reap_group(group: int, deadline: float) -> None:
    """Let the kernel forget what a killed process had started, which is ours now if orphans are."""
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG) is None:
                time.sleep(_LOOK_SECONDS)
