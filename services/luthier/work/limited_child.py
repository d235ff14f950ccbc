"""The inside of a limited process: what it may use, and how it hears requests and answers them.

A module that runs as such a process calls `serve` from its `main`; `luthier.work.limited` starts it, and
`luthier.work.limited_fork` forks one. Requests and answers are JSON of known length over a socket of their own, since
libraries print to standard output. Imports nothing but the standard library and the error tree: what stands here runs
beside templates and tokenizers that nobody has read.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import Failure, LuthierError

_HEAD = struct.Struct(">Q")
_PIECE_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_LEFT_SHARE = 2
"""A process of which requests have left half of its memory taken is ended: the next finds as much as that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may take, from its beginning or its last note on.

    Memory is counted beside the program, with what requests before it left there: less than half of it.
    """

    cpu_seconds: int = 30
    memory_bytes: int = 2 << 30
    wall_seconds: float = 120.0


class Note(Protocol):
    """Tells the other side something of a request; the request has its time and its CPU time anew."""

    def __call__(self, message: Mapping[str, Any], spent_seconds: float = 0.0) -> None:
        """Send a note. So much CPU time counts as spent already."""
        ...


Handle = Callable[[Mapping[str, Any], Note], Mapping[str, Any]]
"""Turns a request into its result."""


class FramesBroken(Exception):
    """The other side sent what is no frame, or more than may be sent."""


class Frames:
    """JSON values of known length over a socket. Text may hold lone surrogates.

    A socket with a timeout calls `waiting` whenever it has passed; what that raises ends the call.
    """

    def __init__(self, connection: socket.socket, limit_bytes: int, waiting: Callable[[], None]) -> None:
        self._connection = connection
        self._limit_bytes = limit_bytes
        self._waiting = waiting

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a value. Raises OSError when the other side is gone."""
        data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
        left = memoryview(_HEAD.pack(len(data)) + data)
        while left:
            try:
                left = left[self._connection.send(left) :]
            except TimeoutError:
                self._waiting()

    def receive(self) -> dict[str, Any] | None:
        """Return the next value; None when the other side is gone. Raises FramesBroken."""
        head = self._read(_HEAD.size)
        if head is None:
            return None
        (size,) = _HEAD.unpack(head)
        if size > self._limit_bytes:
            raise FramesBroken(f"an answer must have at most {self._limit_bytes} bytes, got {size}")
        data = self._read(size)
        if data is None:
            return None
        try:
            message = json.loads(data.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise FramesBroken(f"an answer must be JSON: {type(error).__name__}") from error
        if not isinstance(message, dict):
            raise FramesBroken(f"an answer must be a JSON object, got {type(message).__name__}")
        return message

    def _read(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._connection.recv(min(count - len(data), _PIECE_BYTES))
            except TimeoutError:
                self._waiting()
                continue
            except ConnectionResetError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)


def serve(handle: Handle, *, writes_files: bool) -> None:
    """Answer requests until the parent is gone. Usage of the process: MODULE DESCRIPTOR PARENT_PID LIMITS.

    `writes_files` False forbids the process every write to a file.
    """
    descriptor, parent, limits = int(sys.argv[1]), int(sys.argv[2]), Limits(**json.loads(sys.argv[3]))
    answer_requests(handle, socket.socket(fileno=descriptor), parent, limits, writes_files=writes_files)


def answer_requests(
    handle: Handle, connection: socket.socket, parent: int, limits: Limits, *, writes_files: bool
) -> None:
    """Make this process, which has one thread, a limited one; answer requests until the parent is gone."""
    _isolate(parent)
    frames = Frames(connection, sys.maxsize, lambda: None)
    # Until here an import that fails is seen in the parent's log; from here on libraries print what they are given.
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    started_bytes = _size_bytes()
    _limit_size(started_bytes + limits.memory_bytes, writes_files=writes_files)
    most_left_bytes = started_bytes + limits.memory_bytes // _LEFT_SHARE

    def note(message: Mapping[str, Any], spent_seconds: float = 0.0) -> None:
        _limit_cpu(limits.cpu_seconds - spent_seconds)
        try:
            frames.send({"note": message})
        except OSError:
            os._exit(1)  # nobody listens any more

    frames.send({"ready": True})
    while (request := frames.receive()) is not None:
        _limit_cpu(limits.cpu_seconds)
        answer = _answer(handle, request, note)
        # What took the memory may still hold it, and another's request must not be refused for that.
        ends = "limit" in answer or _is_left_large(most_left_bytes)
        try:
            frames.send({**answer, "ends": ends})
        except MemoryError:
            frames.send({"limit": "memory"})
            return
        if ends:
            return


def _is_left_large(most_bytes: int) -> bool:
    """Tell whether more memory is taken, less what is garbage: a failure's frames, with all that they hold, are."""
    if _size_bytes() <= most_bytes:
        return False
    gc.collect()
    return _size_bytes() > most_bytes


def _answer(handle: Handle, request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    try:
        return {"result": handle(request, note)}
    except LuthierError as error:
        return {"failure": dataclasses.asdict(Failure.of(error))}
    except MemoryError:
        return {"limit": "memory"}
    # Rust's panics are no Exception, and whatever else a tokenizer raises must not end the process unnamed.
    except BaseException as error:
        return {"broken": f"{type(error).__name__}: {error}"[:2000]}


def _isolate(parent: int) -> None:
    """Leave the network where the kernel lets us, gain no rights any more, and end with the parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Without privileges only a user namespace of its own may leave the network; some kernels forbid both, and then
    # the process keeps a network, in which it has no address and no credential of a service.
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when the thread that started it ends, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the signal was set
        sys.exit(1)


def _limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _size_bytes() -> int:
    """Return the address space of this process, which is what its limit counts."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit_size(size_bytes: int, *, writes_files: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not writes_files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))
