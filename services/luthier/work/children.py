"""Work in processes of their own: what crashes, hangs or takes all memory ends alone, and its memory goes with it.

A worker is the driver: it has the lease, the connections and the cache, and computes nothing. A child does one piece
of work and ends. All of them are forked from one process that has imported what they need, since importing takes
seconds; one more, which has prepared besides, may wait for the next piece of work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from luthier.errors import InvalidArgument, LuthierError, Reason, Unavailable
from luthier.runtime import tracing
from luthier.work import control_groups
from luthier.work.child_watch import Always, Overseer, Patience, Watch
from luthier.work.nursery import Calls, Child, Connected, Nursery, Program, Send
from luthier.work.worker_figures import NURSERY, ChildCounts

__all__ = ["Calls", "Children", "Connected", "Program", "Send"]

_logger = logging.getLogger(__name__)


class Children:
    """Runs each piece of work in a child of its own; one more may wait. For any thread.

    Args:
        program: what they run.
        patience: how long one may go without a sign that it does its work.
        oom_kills: counts the processes that the kernel has ended for want of memory.

    Attributes:
        num_running: how many of them work just now.
        counts: how many were given work, and how many failed.
    """

    def __init__(
        self,
        program: Program,
        patience: Patience | None = None,
        oom_kills: Callable[[], int] = control_groups.oom_kills,
    ) -> None:
        self._program = program
        self._patience = patience or Patience()
        self._oom_kills = oom_kills
        self._lock = threading.Lock()
        self._nursery: Nursery | None = None
        self._spare: Child | None = None
        self.num_running = 0
        self.counts = ChildCounts()
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
                self._spare = self._tended().child()

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
            spare.require_ready(self._patience, Always())
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
        patience: Patience | None = None,
        connected: Connected = lambda _: None,
    ) -> Any:
        """Return what a child makes of an order; it ends with it, or as soon as the overseer wants it no more.

        Args:
            order: what to do.
            calls: what it may tell us and ask of us meanwhile.
            overseer: asked often whether the work is still wanted; is told where a child that failed was at.
            step: which of them it makes after each of its steps, which should take alike long; empty: none.
            patience: in place of that of all.
            connected: given, once it has its order, what sends it more, from any thread, while it is at it.

        Raises:
            LuthierError: what the work raised, or what the overseer did.
            ResourceExhausted: OUT_OF_MEMORY, the kernel ended it.
            Unavailable: CRASHED or STALLED; SHUTTING_DOWN, after `close`.
            MemoryError: there was not enough of it.
        """
        child = self._taken()
        self.counts.began()
        allowed = patience or self._patience
        try:
            with _kept(child):
                _prepare(child, self._patience, overseer)
                watch = Watch(child.pid, allowed, overseer, step)
                return child.run(order, calls, overseer, watch, connected)
        except LuthierError as error:
            self.counts.failed(error.reason)
            raise
        finally:
            self.counts.ended()
            try:
                child.end()
            finally:
                self._released()

    def close(self) -> None:
        """Let no child wait any more. One that works goes on to its end."""
        with self._lock:
            self._closed = True
            # First of all: from then on no child starts that is not known.
            if self._nursery is not None:
                self._nursery.end()
            self._drop_spare()

    def _tended(self) -> Nursery:
        """Return the process that children are forked from; one that is gone is replaced. Under the lock."""
        if self._closed:
            raise Unavailable("no work begins any more", reason=Reason.SHUTTING_DOWN)
        if self._nursery is not None and not self._nursery.is_alive:
            process = self._nursery.process
            _logger.warning(
                "the process that others are forked from is gone, another begins",
                extra={"pid": process.pid, "exit_code": process.code},
            )
            self.counts.failed(NURSERY)
            self._nursery.end()
            self._nursery = None
        if self._nursery is None:
            self._nursery = Nursery(self._program, self._oom_kills)
        return self._nursery

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.end()

    def _taken(self) -> Child:
        with self._lock:
            nursery = self._tended()
            child, self._spare = self._spare, None
            if child is not None and not child.is_alive:
                _logger.warning("the process that waited for work is gone, another begins")
                child.end()
                child = None
            child = child or nursery.child()
            self.num_running += 1
        return child

    def _released(self) -> None:
        with self._lock:
            self.num_running -= 1
            is_idle = self.num_running == 0
        if not is_idle:
            return
        try:
            self.warm()
        except (OSError, LuthierError) as error:  # the work is done: whoever begins the next is told
            _logger.warning("no process could be prepared for the next work: %s", error)


@contextmanager
def _kept(child: Child) -> Iterator[None]:
    """Keep the time that a child has as a span: what it tells meanwhile is of whoever wants it."""
    began, failed = time.monotonic(), ""
    try:
        yield
    except LuthierError as error:
        failed = error.reason
        raise
    finally:
        tracing.past("child", time.monotonic() - began, {"process.pid": child.pid}, failed=failed)


def _prepare(child: Child, patience: Patience, overseer: Overseer) -> None:
    """Wait until a child can take its order. When it cannot, the worker is at fault and not the work.

    Raises:
        Unavailable: CRASHED or STALLED.
        LuthierError: the work is not wanted any more.
    """
    try:
        child.require_ready(patience, overseer)
    except InvalidArgument as error:
        raise Unavailable(
            f"the process that was to do the work could not begin: {error.message}", reason=Reason.CRASHED
        ) from error
