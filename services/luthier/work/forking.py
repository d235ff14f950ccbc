"""Forking with one thread and no open device, which is looked at before each fork; the child is the driver's own.

What survives no fork is other threads, with the locks that they hold, and what the driver of a device keeps of its
process. A process that has neither, and has only imported, can be forked as often as wanted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from luthier.errors import Reason, Unavailable
from luthier.work.limited_child import end_with_parent

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_DEVICE = re.compile(r"/dev/(nvidia|kfd|dri/|accel)")
_THREADS_END_SECONDS = 5.0
"""For threads that are told to end and that nobody waits for, as transformers' when it has loaded a model."""
_LOOK_SECONDS = 0.0005
_OOM_SCORE = 500
"""Counts as half of the machine's memory held besides, of a group's where that has a limit."""

Say = Callable[[Connection, int | Exception], None]
"""Tells a driver of its child, by the line to it: its process number, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a child is given.

    Attributes:
        line: to its driver.
        stacks: a file for what its threads are at.
    """

    line: Connection
    stacks: int

    def close(self) -> None:
        """Let go of both."""
        self.line.close()
        os.close(self.stacks)


def forked(control: socket.socket, driver: int, say: Say, refusal: Exception | None) -> Request:
    """Fork a child for each request that comes, and return in the child.

    The child's parent is the driver, as if that had started it: the kernel tells the driver how the child ends, and
    ends the child when it ends the driver. What becomes of this process then matters to no child. It ends when the
    driver closes its end, and when it cannot fork: the driver is told why.

    Args:
        control: where requests come from.
        driver: number of the process that asks, which has called `adopt_orphans`.
        say: tells it.
        refusal: why no child can be forked; None: one can.
    """
    if refusal is None:
        _end_threads()
        gc.collect()
        gc.freeze()
    while True:
        request = _next(control)
        try:
            if refusal is not None:
                raise refusal
            require_alone()
            if _fork(request.line, driver, say):
                return request
        except Exception as error:
            with suppress(OSError):
                say(request.line, error)
            _leave(1)
        request.close()


def require_alone() -> None:
    """Return if this process has one thread and no device.

    Raises:
        Unavailable: CRASHED; the message names the threads or the devices.
    """
    deadline = time.monotonic() + _THREADS_END_SECONDS
    while (others := _other_threads()) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    if others:
        raise Unavailable(
            f"the process that others are forked from must have one thread, it has {len(others)} more: "
            f"{', '.join(others)}",
            reason=Reason.CRASHED,
        )
    if devices := _open_devices():
        raise Unavailable(
            f"the process that others are forked from must have opened no device, it has {', '.join(devices)}",
            reason=Reason.CRASHED,
        )


def adopt_orphans(*, adopt: bool) -> None:
    """Make this process the parent of what its descendants leave behind, or no more."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def name_process(name: str) -> None:
    """Give this process a name for people who look at processes, of at most 15 characters."""
    _prctl(_PR_SET_NAME, name.encode())


def _next(control: socket.socket) -> Request:
    data, descriptors, _, _ = socket.recv_fds(control, 1, 2, socket.MSG_CMSG_CLOEXEC)
    if not data:
        _leave(0)
    line, stacks = descriptors
    return Request(line=Connection(line), stacks=stacks)


def _leave(code: int) -> NoReturn:
    """End this process, without what libraries that were loaded for its children do at an end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fork(line: Connection, driver: int, say: Say) -> bool:
    """Return True in a new child of the driver's, False in this process.

    The process between the two ends at once: the kernel gives what it leaves behind to the driver.

    Raises:
        Unavailable: CRASHED, there is no memory or no room for another process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        between = os.fork()
    except OSError as error:
        raise no_fork(str(error)) from error
    if between:
        _, status = os.waitpid(between, 0)
        if status:
            raise no_fork(f"the process between ended with code {os.waitstatus_to_exitcode(status)}")
        return False
    between, is_child, status = os.getpid(), False, 1
    try:
        child = os.fork()
        is_child = not child
        if child:
            _announce(line, child, say)
            status = 0
    finally:
        if not is_child:
            os._exit(status)
    _join(between, driver)
    return True


def _announce(line: Connection, child: int, say: Say) -> None:
    """Tell the driver of its child, which it does not know before. A child that it wants no more ends."""
    try:
        say(line, child)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _join(between: int, driver: int) -> None:
    """Become the driver's child, end with it, and lead a group."""
    while os.getppid() == between:
        time.sleep(_LOOK_SECONDS)
    end_with_parent(driver)
    os.setpgid(0, 0)
    _offer_to_end()


def _offer_to_end() -> None:
    """Have the kernel end this process, for want of memory, rather than one that holds a lease or that others need.

    Its end has a reason that its task tells; without its driver nobody could.
    """
    path = Path("/proc/self/oom_score_adj")
    with suppress(OSError, ValueError):  # a system without it chooses for itself
        path.write_text(str(max(_OOM_SCORE, int(path.read_text()))), encoding="ascii")


def no_fork(why: str) -> Unavailable:
    """Return the error of who could fork no process."""
    return Unavailable(f"a process for the work could not be forked: {why}", reason=Reason.CRASHED)


def _end_threads() -> None:
    """Have libraries that mind forks end their threads before one; they start them again when they compute.

    OpenBLAS starts its threads when it is loaded, and its handler ends them.
    """
    first = os.fork()
    if not first:
        os._exit(0)
    os.waitpid(first, 0)


def _other_threads() -> list[str]:
    """Return the names of this process's threads but the first."""
    known = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name == str(os.getpid()):
            continue
        with suppress(OSError):  # it has ended
            names.append(known.get(task.name) or (task / "comm").read_text().strip())
    return names


def _open_devices() -> list[str]:
    """Return what this process has opened of devices that compute."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of this listing is closed by then
            if _DEVICE.match(target := str(descriptor.readlink())):
                found.add(target)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found.add("torch.cuda")
    return sorted(found)


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
