"""A process that has imported what children need, the nursery, and the children that it forks, each at a word."""

from __future__ import annotations

import os
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
from typing import Any

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.runtime import config
from luthier.runtime.logs import bound
from luthier.work import control_groups
from luthier.work.child import DUMP_SIGNAL, Answer, Call, Done, Message, Order, Ready, Refused, Started
from luthier.work.child_ends import End, dumped
from luthier.work.child_watch import Always, Overseer, Patience, Stalled, Watch
from luthier.work.forking import adopt_orphans
from luthier.work.limited import spawner
from luthier.work.processes import Process, adopted

_POLL_SECONDS = 0.1
_DUMP_SECONDS = 2.0
_THREADLESS = {
    # Arrow's allocator of its second choice, which nobody uses, starts a thread when it is loaded.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
_MOVE_SECONDS = 60
"""A message that has begun is read and written within this, or its other end hangs."""

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
        setup: what it is given to begin and to prepare with.
        environment: set for it beside this process's own, before it imports anything.
    """

    command: Sequence[str]
    setup: Any = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Nursery:
    """The process that a program's children are forked from; it computes nothing. For any thread.

    It is started by exec and begins at once, as the program says, which may take seconds; a child that is asked for
    meanwhile is forked when it has begun. Its end ends no child.

    Args:
        program: what it runs.
        oom_kills: counts the processes that the kernel has ended for want of memory.
    """

    def __init__(self, program: Program, oom_kills: Callable[[], int] = control_groups.oom_kills) -> None:
        self.oom_kills = oom_kills
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._said = ""
        self._lock = threading.Lock()
        _ADOPTING.begin()
        # A process is told of its parent's death by the end of the thread that started it: that thread must stay.
        spawned = spawner().submit(_spawn, program, self._stacks.fileno())
        started, self._control = spawned.result()
        self.process = Process(started.pid, started.wait)
        # What goes wrong here shows where a child is waited for.
        with Connection(os.dup(self._control.fileno())) as control, suppress(OSError):
            control.send(program.setup)

    @property
    def is_alive(self) -> bool:
        """Whether children can be asked for."""
        return self.process.code is None

    def child(self) -> Child:
        """Return a child that is to be forked. It begins to prepare at once."""
        return Child(self)

    def ask(self, line: socket.socket, stacks: int) -> None:
        """Ask for a child at the other end of a line. Raises OSError when the process is gone or hangs."""
        socket.send_fds(self._control, [b"+"], [line.fileno(), stacks])

    def said(self) -> str:
        """Return what it has written of its threads; empty: nothing."""
        with self._lock:
            return self._said if self._stacks.closed else dumped(self._stacks)

    def end(self) -> None:
        """End it, whatever it does, and let go of it; its children go on."""
        with self._lock:
            if self._stacks.closed:
                return
            self.process.end()
            self._control.close()
            self._said = dumped(self._stacks)
            self._stacks.close()
        _ADOPTING.end()


class Child:
    """One process and the line to it. For one thread at a time, but for what `run` says is for any."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._process: Process | None = None
        self._oom_kills = nursery.oom_kills
        self._kills_before = nursery.oom_kills()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._is_ready = False
        self._sending = threading.Lock()
        self._stuck: Stalled | None = None
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _MOVE_SECONDS, 0))
        self._connection = Connection(ours.detach())
        with theirs, suppress(OSError):  # it shows where the child is waited for
            nursery.ask(theirs, self._stacks.fileno())

    @property
    def pid(self) -> int:
        """Its process's number; its nursery's until it has started."""
        return self._leader.pid

    @property
    def is_alive(self) -> bool:
        """Whether it goes on, or is to start."""
        return self._leader.code is None

    def require_ready(self, patience: Patience, overseer: Overseer) -> None:
        """Return once it has prepared, as long as an overseer wants it.

        Raises:
            Exception: what beginning or preparing raised.
            LuthierError: as `run`.
        """
        if self._is_ready:
            return
        watch = Watch(self.pid, patience, overseer)
        with self._ends_named(Always(), watch):
            message = self._next(watch)
        if isinstance(message, Started):
            watch = Watch(self.pid, patience, overseer)
            with self._ends_named(Always(), watch):
                message = self._next(watch)
        assert isinstance(message, Ready), f"a child says that it is ready, this one {message}"
        self._is_ready = True

    def run(self, order: Any, calls: Calls, overseer: Overseer, watch: Watch, connected: Connected) -> Any:
        """Return what it makes of an order once it is ready.

        `connected` is given what sends it more, from any thread, as `Children.run` says.

        Raises:
            Exception: what the work raised.
            LuthierError: what the overseer raised.
            ResourceExhausted: OUT_OF_MEMORY, the kernel ended it.
            Unavailable: CRASHED or STALLED.
        """
        self._kills_before = self._oom_kills()  # a spare may have waited for days
        with self._ends_named(overseer, watch):
            self._send(Order(value=order, fields=bound()))
            connected(self._tell)
            while not isinstance(message := self._next(watch), Done):
                if isinstance(message, Call):
                    self._serve(message, calls)
                    watch.served()
            return message.value

    def end(self) -> None:
        """End it and all that it started, whatever they do, and let go of it."""
        self._hear_of_start()
        if self._process is not None:
            self._process.end()
        with self._sending:  # who sends at this moment fails now that nobody reads
            self._connection.close()
        self._stacks.close()

    def _tell(self, message: Any) -> None:
        """Send a message. Where that cannot be done, `run` ends; nothing follows what may have been half sent."""
        if self._stuck is not None:
            return
        try:
            self._send(message)
        except _Gone:
            pass  # it shows where the child is listened to
        except Stalled as stalled:
            self._stuck = stalled

    @property
    def _leader(self) -> Process:
        return self._process or self._nursery.process

    def _hear_of_start(self) -> None:
        """Learn whether it has started. From here on its nursery can say so no more, and ends it where it would."""
        if self._process is not None:
            return
        with socket.socket(fileno=os.dup(self._connection.fileno())) as line, suppress(OSError, EOFError):
            line.shutdown(socket.SHUT_RD)
            if self._connection.poll(0):
                self._start(self._connection.recv())

    def _start(self, message: Message) -> None:
        if isinstance(message, Started):
            self._process = adopted(message.pid)

    def _serve(self, call: Call, calls: Calls) -> None:
        """Do what the child asks for. What that raises ends the child's work: it could do nothing about it."""
        value = calls[call.name](*call.arguments, **call.named)
        if call.wants_answer:
            self._send(Answer(value=value))

    def _next(self, watch: Watch) -> Message:
        self._require_moving()
        while not self._connection.poll(_POLL_SECONDS):
            self._require_moving()
            watch.look()
        try:
            message: Message = self._connection.recv()
            self._start(message)
        except BlockingIOError as error:
            raise Stalled(f"half of a message came, and no more for {_MOVE_SECONDS} s") from error
        except (EOFError, OSError) as error:
            raise _Gone from error
        watch.heard(message)
        if isinstance(message, Refused):
            if self._process is None:
                self._nursery.end()  # it ends by itself now: the next child is another's
            raise message.error
        return message

    def _require_moving(self) -> None:
        if self._stuck is not None:
            raise self._stuck

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
            raise self._error_of_stall(overseer, watch, str(stalled)) from stalled

    def _error_of_end(self, overseer: Overseer, watch: Watch) -> LuthierError:
        code = self._leader.wait()
        if code is None:
            return Unavailable("the process that did the work closed its line", reason=Reason.CRASHED)
        if stacks := self._dumped():
            overseer.log(f"the process that did the work crashed:\n{stacks}", "WARNING")
        kills = self._oom_kills() - self._kills_before
        return End(code=code, oom_kills=kills, peak_bytes=watch.peak_bytes).error()

    def _error_of_stall(self, overseer: Overseer, watch: Watch, why: str) -> LuthierError:
        with suppress(ProcessLookupError):
            os.kill(self.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + _DUMP_SECONDS
        stacks, before = "", None
        while time.monotonic() < deadline and (not stacks or stacks != before):
            time.sleep(_POLL_SECONDS)
            if self._is_killed():
                return self._error_of_end(overseer, watch)
            before, stacks = stacks, self._dumped()
        where = stacks or "it does not say where: it is stopped, or the kernel holds it"
        overseer.log(f"the process that does the work hangs:\n{where}", "WARNING")
        if self._process is None:
            self._nursery.end()  # no other child would come of it either
        return Unavailable(
            f"the process that did the work did not go on and was ended: {why}", reason=Reason.STALLED
        )

    def _is_killed(self) -> bool:
        """Whether a signal ended it; but not the one that asks where it is, for which it may not be ready yet."""
        code = self._leader.code
        return code is not None and code < 0 and code != -DUMP_SIGNAL

    def _dumped(self) -> str:
        return self._nursery.said() if self._process is None else dumped(self._stacks)


class _Gone(Exception):
    """The other end of a line is closed."""


class _Adopting:
    """Has this process adopt orphans as long as it has a nursery."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num = 0

    def begin(self) -> None:
        with self._lock:
            self._num += 1
            adopt_orphans(adopt=True)

    def end(self) -> None:
        with self._lock:
            self._num -= 1
            adopt_orphans(adopt=self._num > 0)


_ADOPTING = _Adopting()


def _spawn(program: Program, stacks: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _MOVE_SECONDS, 0))
    with theirs:
        words = [str(theirs.fileno()), str(os.getpid()), str(stacks)]
        process = subprocess.Popen(
            [sys.executable, *program.command, *words],
            stdin=subprocess.DEVNULL,
            env={**_THREADLESS, **config.others(), **program.environment},
            pass_fds=[theirs.fileno(), stacks],
            process_group=0,
        )
    return process, ours
