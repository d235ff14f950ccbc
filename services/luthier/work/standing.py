"""A child that stays: loaded once, asked by many at the same time, ended when nobody needs it any more.

What the parts of an answer are is between who asks and the child; see `luthier.work.standing_child`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from luthier.errors import Failure, Internal, LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.work.child_watch import Stalled
from luthier.work.children import Calls, Children, Send
from luthier.work.events import Severity
from luthier.work.limited import Check
from luthier.work.standing_child import Part, Request, Stop

STOP_SECONDS = 6.0
"""A child that nobody else waits for lets go of what was stopped within this, or is ended."""
_STOP_STEPS = 2
"""Pieces of work after which it has: the one that it was at, and one whose outcome says so."""
_CHECK_SECONDS = 0.1
_END_SECONDS = 20.0
_logger = logging.getLogger(__name__)

Log = Callable[[str, Severity], None]
"""Reports a line for people."""


class _Stopped(NamedTuple):
    """When a request was stopped, by the clock and by the steps made till then."""

    at: float
    num_steps: int


class Requests:
    """What is asked and not yet answered, and how each asker hears its own. For any thread.

    Args:
        send: gives a request, or the stop of one, to whatever answers.

    Attributes:
        num_steps: pieces of work done so far, whoever asked for them.
        ended: why nothing is answered any more; None: it is.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, SimpleQueue[Part]] = {}
        self._stopped: dict[int, _Stopped] = {}
        self.num_steps = 0
        self.ended: LuthierError | None = None

    def call(self, name: str, arguments: Sequence[Any] = (), check: Check = lambda: None) -> Any:
        """Return the whole of an answer that has one part. Raises as `stream`."""
        with closing(self.stream(name, arguments, check)) as parts:
            return next(parts)

    def stream(
        self, name: str, arguments: Sequence[Any] = (), check: Check = lambda: None
    ) -> Generator[Any, None, None]:
        """Yield the parts of an answer. Closing the iterator, or a `check` that raises, stops the request.

        `check` is called before every part, and ten times a second while there is none.

        Raises:
            LuthierError: what the child raised, why it ended, or what `check` raised.
        """
        number, parts = self._begin(name, arguments)
        try:
            while True:
                check()
                try:
                    part = parts.get(timeout=_CHECK_SECONDS)
                except Empty:
                    continue
                if part.error is not None:
                    raise part.error
                yield part.value
                if part.is_last:
                    return
        finally:
            self._leave(number)

    def say(self, parts: Sequence[Part]) -> None:
        """Hand parts to whom they belong; parts of what was stopped go nowhere."""
        with self._lock:
            for part in parts:
                asker = self._open.get(part.number)
                if part.is_last:
                    self._open.pop(part.number, None)
                    self._stopped.pop(part.number, None)
                if asker is not None:
                    asker.put(part)

    def step(self, parts: Sequence[Part]) -> None:
        """Note that a piece of work is done, and hand out the parts that it made."""
        self.num_steps += 1
        self.say(parts)

    def end(self, error: LuthierError) -> None:
        """Tell everybody who asks, now or later, why there are no answers."""
        with self._lock:
            self.ended = error
            for number, asker in self._open.items():
                asker.put(Part(number, error=_again(error)))
            self._open.clear()
            self._stopped.clear()

    def unheard_seconds(self) -> float:
        """Return for how long something that was stopped has not been let go of, where nothing excuses it.

        That somebody waits for anything else does, and that the step it was at has come to its end since.
        """
        with self._lock:
            found = (stopped.at for stopped in self._stopped.values() if self._is_due(stopped))
            return max((time.monotonic() - at for at in found), default=0.0)

    def _is_due(self, stopped: _Stopped) -> bool:
        return not self._open and not 0 < self.num_steps - stopped.num_steps <= _STOP_STEPS

    def _begin(self, name: str, arguments: Sequence[Any]) -> tuple[int, SimpleQueue[Part]]:
        asker: SimpleQueue[Part] = SimpleQueue()
        with self._lock:
            if self.ended is not None:
                raise _again(self.ended)
            number = next(self._numbers)
            self._open[number] = asker
            self._send(Request(number=number, name=name, arguments=arguments))
        return number, asker

    def _leave(self, number: int) -> None:
        with self._lock:
            if self._open.pop(number, None) is not None:
                self._stopped[number] = _Stopped(time.monotonic(), self.num_steps)
                self._send(Stop(number=number))


class Standing:
    """One child that stays, its requests, and the thread that listens to it. For any thread.

    It goes on until it is closed, crashes, hangs or is killed; its memory is gone then. `requests.ended` says why.

    Args:
        children: of which it is one.
        order: what it begins with.
    """

    def __init__(self, children: Children, order: Any) -> None:
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self.requests = Requests(self._outbox.put)
        self._children = children
        self._facts: SimpleQueue[Any] = SimpleQueue()
        self._closing = threading.Event()
        self._logs: list[Log] = []
        self._logs_lock = threading.Lock()
        self._listening = threading.Thread(target=self._run, args=(order,), name="standing", daemon=True)
        self._listening.start()

    def begun(self, check: Check = lambda: None) -> Any:
        """Return what the child says of itself once it can be asked, to the one who waits for it.

        Raises:
            LuthierError: why it ended instead, or what `check` raised.
        """
        while True:
            check()
            try:
                return self._facts.get(timeout=_CHECK_SECONDS)
            except Empty:
                if self.requests.ended is not None:
                    raise _again(self.requests.ended) from None

    @contextmanager
    def reporting(self, log: Log) -> Iterator[None]:
        """Report to `log` too, for the length of a block, where the child was at if it crashes or hangs."""
        with self._logs_lock:
            self._logs.append(log)
        try:
            yield
        finally:
            with self._logs_lock:
                self._logs.remove(log)

    def close(self) -> None:
        """End the child, whatever it does; what waits for it is told so."""
        self._closing.set()
        self._listening.join(_END_SECONDS)

    def check(self) -> None:
        """As `heed`."""
        self.heed()

    def heed(self) -> None:
        """Return if the child is still wanted and does what it is told.

        Raises:
            Unavailable: SHUTTING_DOWN.
            Stalled: it does not let go of what was stopped.
        """
        if self._closing.is_set():
            raise _shutting_down()
        if (seconds := self.requests.unheard_seconds()) > STOP_SECONDS:
            raise Stalled(f"it was told to stop what it was asked for, and did not for {seconds:.0f} s")

    def log(self, text: str, severity: Severity = "INFO") -> None:
        """Report a line to the worker's log and to all who have asked for it."""
        _logger.log(logging.getLevelName(severity), text)
        with self._logs_lock:
            for log in self._logs:
                log(text, severity)

    def _run(self, order: Any) -> None:
        sending: threading.Thread | None = None

        def connected(send: Send) -> None:
            nonlocal sending
            # In a thread of its own: a child that reads nothing must not keep askers from hearing that they may go.
            sending = threading.Thread(target=self._send, args=(send,), name="standing-out", daemon=True)
            sending.start()

        calls: Calls = {"begun": self._facts.put, "say": self.requests.say, "step": self._step}
        error: LuthierError
        try:
            self._children.run(order, calls, self, "step", connected=connected)
            error = Unavailable("the process that did the work ended", reason=Reason.CRASHED)
        except LuthierError as raised:
            error = raised
        except MemoryError as raised:
            error = ResourceExhausted(
                f"the process that did the work ran out of memory: {raised}", reason=Reason.OUT_OF_MEMORY
            )
        except Exception as raised:  # whoever asks must hear of it, whatever it is
            _logger.exception("listening to a process failed unexpectedly")
            error = Internal(f"{type(raised).__name__}: {raised}")
        self.requests.end(error)
        self._outbox.put(None)
        if sending is not None:
            sending.join(_END_SECONDS)

    def _step(self, parts: Sequence[Part]) -> None:
        self.requests.step(parts)
        # One that says a lot is never looked at.
        self.heed()

    def _send(self, send: Send) -> None:
        while (message := self._outbox.get()) is not None:
            send(message)


def _again(error: LuthierError) -> LuthierError:
    """Return an error anew for each who is told it: a traceback belongs to one thread."""
    return Failure.of(error).to_error()


def _shutting_down() -> Unavailable:
    return Unavailable("the model is being taken out of memory; try again", reason=Reason.SHUTTING_DOWN)
