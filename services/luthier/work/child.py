"""The inside of a child: a process that does one piece of work for a worker, its driver, and ends with it.

A module that runs as a child calls `serve` from its `main`; `luthier.work.nursery` starts it. Driver and child speak
over a socket of their own, since libraries print to standard output: the driver says what to do, the child tells how it
goes on, asks for what only the driver can do, and answers. Messages are pickles: both ends are our code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from luthier.errors import Internal, LuthierError
from luthier.runtime.logs import bind
from luthier.work.forking import forked, name_process
from luthier.work.limited_child import end_with_parent

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a child write what each of its threads is at; it goes on."""
NURSERY_NAME = "luthier-nursery"
"""What the kernel calls the process that children are forked from; theirs is another."""
ALIVE_SECONDS = 0.5
_CHILD_NAME = "luthier-child"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """There is a child, the process of a number. Its nursery says so, before the child says anything."""

    pid: int


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
class Order:
    """What a child is to do, and the fields that its log's lines have while it does."""

    value: Any
    fields: Mapping[str, str]


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
    """What beginning, preparing or the work raised."""

    error: Exception


Message = Started | Ready | Alive | Idle | Call | Done | Refused


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
            pass
        except Exception:  # whatever it is: nothing more would be heard
            _logger.exception("what the driver says cannot be read")
        finally:
            os.killpg(0, signal.SIGKILL)


Work = Callable[[Line, Any], Any]
"""Does what an order says and returns the result."""


def serve(prepare: Callable[[Any], Work], begin: Callable[[Any], None] = lambda _: None) -> None:
    """Begin, once; then, in each child that is forked: prepare, wait for the order, do it, answer.

    The process that is started is the nursery, which forks a child whenever its driver asks for one and never returns
    from here; the children do. Usage: MODULE DESCRIPTOR DRIVER_PID STACKS; STACKS is a file for what each thread is at,
    open for writing, when the nursery crashes or is asked for it.

    Args:
        prepare: is given the setup that all children share and returns what does an order.
        begin: is given it too, before: it imports and builds what children share. It starts no thread that stays and
            opens no device, else no child is forked and the driver is told.
    """
    descriptor, driver, stacks = (int(word) for word in sys.argv[1:4])
    end_with_parent(driver)
    name_process(NURSERY_NAME)
    _dump_into(stacks)
    with socket.socket(fileno=descriptor) as control:
        control.set_inheritable(False)
        setup = _setup(control)
        request = forked(control, driver, _say, _error_of(begin, setup))
    name_process(_CHILD_NAME)
    _dump_into(request.stacks)
    os.close(stacks)
    _reseed()
    line = Line(request.line)
    line.send(_answer(prepare, setup, line))


def _setup(control: socket.socket) -> Any:
    with Connection(os.dup(control.fileno())) as driver:
        try:
            return driver.recv()
        except EOFError:
            raise SystemExit(0) from None


def _say(line: Connection, outcome: int | Exception) -> None:
    line.send(Started(pid=outcome) if isinstance(outcome, int) else Refused(error=outcome))


def _dump_into(stacks: int) -> None:
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)


def _reseed() -> None:
    """Give numpy's generator numbers of this process's own, as Python does with its own after a fork.

    That of torch begins alike in every process, and is seeded by who uses it.
    """
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()


def _error_of(begin: Callable[[Any], None], setup: Any) -> Exception | None:
    try:
        begin(setup)
    except Exception as error:
        return named(error)
    return None


def _answer(prepare: Callable[[Any], Work], setup: Any, line: Line) -> Done | Refused:
    try:
        work = prepare(setup)
        line.send(Ready())
        order: Order = line.next()
        with bind(**order.fields):
            return Done(value=work(line, order.value))
    except Exception as error:
        return Refused(error=named(error))


def named(error: Exception) -> Exception:
    """Return what the driver is told of an error: what nobody foresaw fails the work by name."""
    if isinstance(error, LuthierError | MemoryError):
        return error
    _logger.error("the work failed unexpectedly", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")
