"""The inside of a child: a process that does one piece of work for a worker, its driver, and ends with it.

A module that runs as a child calls `serve` from its `main`; `luthier.work.children` starts it. The two speak over a
socket of their own, since libraries print to standard output: the driver says how to prepare and what to do, the child
tells how it goes on, asks for what only the driver can do, and answers. Messages are pickles: both ends are our code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from luthier.errors import Internal, LuthierError
from luthier.work.limited_child import end_with_parent

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a child write what each of its threads is at; it goes on."""
ALIVE_SECONDS = 0.5
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The child has prepared and waits for its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """The child goes on with its work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """The child has nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Something that the driver is told, or is to do and to answer where `wants_answer`."""

    name: str
    arguments: Sequence[Any] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    wants_answer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a call: what the driver returned."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of the work."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """What preparing or the work raised."""

    error: Exception


Message = Ready | Alive | Idle | Call | Done | Refused


class Line:
    """A child's line to its driver. When the driver is gone, or wants the child no more, the child ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._arrived: SimpleQueue[Any] = SimpleQueue()
        self._said_at = time.monotonic()
        threading.Thread(target=self._hear, name="driver", daemon=True).start()

    def alive(self) -> None:
        """Say that the work goes on. Call it between units of work: it costs nothing when called often."""
        if time.monotonic() - self._said_at >= ALIVE_SECONDS:
            self.send(Alive())

    def idle(self) -> None:
        """Say that there is nothing to do. Call it often: it costs nothing."""
        if time.monotonic() - self._said_at >= ALIVE_SECONDS:
            self.send(Idle())

    def tell(self, name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> None:
        """Tell the driver something that it does not answer."""
        self.send(Call(name=name, arguments=arguments, named=named or {}, wants_answer=False))

    def ask(self, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Return what the driver answers, which ends the child where it cannot. One thread asks at a time."""
        self.send(Call(name=name, arguments=arguments, wants_answer=True))
        answer: Answer = self.next()
        return answer.value

    def send(self, message: Message) -> None:
        """Send a message."""
        with self._sending:
            self._said_at = time.monotonic()
            self._connection.send(message)

    def next(self) -> Any:
        """Return what the driver sends next."""
        return self._arrived.get()

    def _hear(self) -> None:
        try:
            while True:
                self._arrived.put(self._connection.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


Work = Callable[[Line, Any], Any]
"""Does what an order says and returns the result."""


def serve(prepare: Callable[[Any], Work]) -> None:
    """Prepare, wait for the order, do it, answer. Usage of the process: MODULE DESCRIPTOR PARENT_PID STACKS.

    `prepare` is given the setup that all children of a kind share; it may take long, and opens no device. STACKS is a
    file for what each thread is at, open for writing, when the child crashes or is asked for it.
    """
    descriptor, parent, stacks = (int(word) for word in sys.argv[1:4])
    end_with_parent(parent)
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
    os.set_inheritable(descriptor, False)
    line = Line(Connection(descriptor))
    line.send(_answer(prepare, line))


def _answer(prepare: Callable[[Any], Work], line: Line) -> Done | Refused:
    try:
        work = prepare(line.next())
        line.send(Ready())
        return Done(value=work(line, line.next()))
    except (LuthierError, MemoryError) as error:
        return Refused(error=error)
    except Exception as error:  # what nobody foresaw fails the work by name
        _logger.exception("the work failed unexpectedly")
        return Refused(error=Internal(f"{type(error).__name__}: {error}"))
