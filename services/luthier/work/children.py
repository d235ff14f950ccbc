"""Work in processes of their own: what crashes, hangs or takes all memory ends alone, and its memory goes with it.

A worker is the driver: it has the lease, the connections and the cache, and computes nothing. A child does one piece
of work and ends. One more, which has imported all that it needs and opened no device, may wait for the next: importing
takes seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

from luthier.errors import InvalidArgument, LuthierError, Reason, Unavailable
from luthier.runtime import config
from luthier.work import child_ends
from luthier.work.child import DUMP_SIGNAL, Answer, Call, Done, Message, Ready, Refused
from luthier.work.child_ends import End, dumped
from luthier.work.child_watch import Overseer, Patience, Stalled, Watch
from luthier.work.events import Severity
from luthier.work.limited import spawner

_POLL_SECONDS = 0.1
_END_SECONDS = 10.0
_DUMP_SECONDS = 2.0
_MOVE_SECONDS = 60
"""A message that has begun is read and written within this, or its other end hangs."""
_logger = logging.getLogger(__name__)

Calls = Mapping[str, Callable[..., Any]]
"""What a child may tell its driver and ask of it, by name."""
Send = Callable[[Any], None]
"""Sends a child a message. Where it cannot be sent, `Children.run` ends and says why."""
Connected = Callable[[Send], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What children run.

    Attributes:
        command: arguments of the interpreter; what it runs calls `child.serve`.
        setup: what each is given to prepare with.
        environment: set for it beside this process's own, before it imports anything.
    """

    command: Sequence[str]
    setup: Any = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Children:
    """Runs each piece of work in a child of its own; one more may wait. For any thread.

    Args:
        program: what they run.
        patience: how long one may go without a sign that it does its work.
        oom_kills: counts the processes that the kernel has ended for want of memory.

    Attributes:
        num_running: how many of them work just now.
    """

    def __init__(
        self,
        program: Program,
        patience: Patience | None = None,
        oom_kills: Callable[[], int] = child_ends.oom_kills,
    ) -> None:
        self._program = program
        self._patience = patience or Patience()
        self._oom_kills = oom_kills
        self._lock = threading.Lock()
        self._spare: _Child | None = None
        self.num_running = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self) -> None:
        """Let a child prepare for the next piece of work, unless one does."""
        with self._lock:
            if not self._closed and (self._spare is None or not self._spare.is_alive):
                self._drop_spare()
                self._spare = self._start()

    def require_ready(self) -> None:
        """Return once a child has prepared.

        Raises:
            LuthierError: it cannot; or it ended, or hung.
        """
        self.warm()
        with self._lock:
            spare = self._spare
        if spare is None:
            return
        try:
            spare.require_ready(Watch(spare.pid, self._patience, _Nobody()))
        except Exception:
            with self._lock:
                self._drop_spare()
            raise

    def run(
        self,
        order: Any,
        calls: Calls,
        overseer: Overseer,
        step: str = "",
        connected: Connected = lambda _: None,
    ) -> Any:
        """Return what a child makes of an order; it ends with it, or as soon as the overseer wants it no more.

        Args:
            order: what to do.
            calls: what it may tell us and ask of us meanwhile.
            overseer: asked often whether the work is still wanted; is told where a child that failed was at.
            step: which of them it makes after each of its steps, which should take alike long; empty: none.
            connected: given, once it has its order, what sends it more, from any thread, while it is at it.

        Raises:
            LuthierError: what the work raised, or what the overseer did.
            ResourceExhausted: OUT_OF_MEMORY, the kernel ended it.
            Unavailable: CRASHED or STALLED.
            MemoryError: there was not enough of it.
        """
        child = self._taken()
        watch = Watch(child.pid, self._patience, overseer, step)
        try:
            _prepare(child, watch)
            return child.run(order, calls, overseer, watch, connected)
        finally:
            child.end()
            self._released()

    def close(self) -> None:
        """Let no child wait any more. One that works goes on to its end."""
        with self._lock:
            self._closed = True
            self._drop_spare()

    def _start(self) -> _Child:
        return _Child(self._program, self._oom_kills)

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.end()

    def _taken(self) -> _Child:
        with self._lock:
            child, self._spare = self._spare, None
            if child is not None and not child.is_alive:
                _logger.warning("the process that waited for work is gone, another begins")
                child.end()
                child = None
            child = child or self._start()
            self.num_running += 1
        return child

    def _released(self) -> None:
        with self._lock:
            self.num_running -= 1
            is_idle = self.num_running == 0
        if is_idle:
            self.warm()


class _Gone(Exception):
    """The other end of a line is closed."""


class _Child:
    """One process and the line to it."""

    def __init__(self, program: Program, oom_kills: Callable[[], int]) -> None:
        self._oom_kills = oom_kills
        self._kills_before = oom_kills()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        # A process is told of its parent's death by the end of the thread that started it: that thread must stay.
        spawned = spawner().submit(_spawn, program, self._stacks.fileno())
        self._process, self._connection = spawned.result()
        self._is_ready = False
        self._sending = threading.Lock()
        self._stuck: Stalled | None = None
        with suppress(_Gone):  # it shows where the child is waited for
            self._send(program.setup)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def require_ready(self, watch: Watch) -> None:
        """Return once it has prepared. Raises what it raised, or as `run`."""
        if not self._is_ready:
            with self._ends_named(_Nobody(), watch):
                message = self._next(watch)
            assert isinstance(message, Ready), f"a child says that it is ready, this one {message}"
            self._is_ready = True

    def run(self, order: Any, calls: Calls, overseer: Overseer, watch: Watch, connected: Connected) -> Any:
        """Return what it makes of the order. Raises as `Children.run`."""
        with self._ends_named(overseer, watch):
            self._send(order)
            connected(self.tell)
            while not isinstance(message := self._next(watch), Done):
                if isinstance(message, Call):
                    self._serve(message, calls)
                    watch.served()
            return message.value

    def tell(self, message: Any) -> None:
        """Send a message, from any thread. Where that cannot be done, `run` ends."""
        try:
            self._send(message)
        except _Gone:
            pass  # it shows where the child is listened to
        except Stalled as stalled:
            self._stuck = stalled

    def end(self) -> None:
        """End it and all that it started, whatever they do, and let go of it."""
        # Also when it has ended by itself: its group lives on with what it started.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            _logger.error("a killed process does not end: the kernel holds it", extra={"pid": self.pid})
        with self._sending:  # who sends at this moment fails now that nobody reads
            self._connection.close()
        self._stacks.close()

    def _serve(self, call: Call, calls: Calls) -> None:
        """Do what the child asks for. What that raises ends the child's work: it could do nothing about it."""
        value = calls[call.name](*call.arguments, **call.named)
        if call.wants_answer:
            self._send(Answer(value=value))

    def _next(self, watch: Watch) -> Message:
        while not self._connection.poll(_POLL_SECONDS):
            if self._stuck is not None:
                raise self._stuck
            watch.look()
        try:
            message: Message = self._connection.recv()
        except BlockingIOError as error:
            raise Stalled(f"half of a message came, and no more for {_MOVE_SECONDS} s") from error
        except (EOFError, OSError) as error:
            raise _Gone from error
        watch.heard(message)
        if isinstance(message, Refused):
            raise message.error
        return message

    def _send(self, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except BlockingIOError as error:
            raise Stalled(f"it takes no message for {_MOVE_SECONDS} s") from error
        except OSError as error:
            raise _Gone from error

    @contextmanager
    def _ends_named(self, overseer: Overseer, watch: Watch) -> Iterator[None]:
        """Raise why it is gone or hangs, having told the overseer where it was at if it says so."""
        try:
            yield
        except _Gone as gone:
            raise self._error_of_end(overseer, watch) from gone
        except Stalled as stalled:
            raise self._error_of_stall(overseer, str(stalled)) from stalled

    def _error_of_end(self, overseer: Overseer, watch: Watch) -> LuthierError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return Unavailable("the process that did the work closed its line", reason=Reason.CRASHED)
        if stacks := dumped(self._stacks):
            overseer.log(f"the process that did the work crashed:\n{stacks}", "WARNING")
        kills = self._oom_kills() - self._kills_before
        return End(code=code, oom_kills=kills, peak_bytes=watch.peak_bytes).error()

    def _error_of_stall(self, overseer: Overseer, why: str) -> LuthierError:
        with suppress(ProcessLookupError):
            os.kill(self.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + _DUMP_SECONDS
        stacks, before = "", None
        while time.monotonic() < deadline and (not stacks or stacks != before):
            time.sleep(_POLL_SECONDS)
            before, stacks = stacks, dumped(self._stacks)
        where = stacks or "it does not say where: it is stopped, or the kernel holds it"
        overseer.log(f"the process that does the work hangs:\n{where}", "WARNING")
        return Unavailable(
            f"the process that did the work did not go on and was ended: {why}", reason=Reason.STALLED
        )


class _Nobody:
    """Wants a child to prepare, for as long as that takes."""

    def check(self) -> None:
        """It is wanted."""

    def heed(self) -> None:
        """It is wanted."""

    def log(self, text: str, severity: Severity = "INFO") -> None:
        """Say it in the worker's log."""
        _logger.log(logging.getLevelName(severity), text)


def _prepare(child: _Child, watch: Watch) -> None:
    """Wait until a child can take its order. When it cannot, the worker is at fault and not the work.

    Raises:
        Unavailable: CRASHED or STALLED.
        LuthierError: the work is not wanted any more.
    """
    try:
        child.require_ready(watch)
    except InvalidArgument as error:
        raise Unavailable(
            f"the process that was to do the work could not begin: {error.message}", reason=Reason.CRASHED
        ) from error


def _spawn(program: Program, stacks: int) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _MOVE_SECONDS, 0))
    with theirs:
        words = [str(theirs.fileno()), str(os.getpid()), str(stacks)]
        process = subprocess.Popen(
            [sys.executable, *program.command, *words],
            stdin=subprocess.DEVNULL,
            env={**config.others(), **program.environment},
            pass_fds=[theirs.fileno(), stacks],
            process_group=0,
        )
    return process, Connection(ours.detach())
