"""The one thread that may touch a loaded model: it steps the engine and runs what others ask for in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from luthier.lm.decoding import Events
from luthier.lm.engine import Engine

_IDLE_SECONDS = 0.02
_logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who hears, in the engine's thread, how it goes on."""

    def stepped(self, events: Events, failures: Mapping[str, Exception]) -> None:
        """Hear what the rows of requests produced in a step, and which requests failed in it, by id."""
        ...

    def idle(self) -> None:
        """Hear, again and again, that there is nothing to do."""
        ...

    def ended(self) -> None:
        """Hear that the thread ends and nothing is done any more."""
        ...


class EngineThread:
    """Runs an engine. Every method may be called from any thread but the engine's own.

    Requests go to the engine itself; the listener hears what becomes of them.
    """

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self._engine = engine
        self._listener = listener
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """Let a function be run in the engine's thread, between two steps. It raises nothing."""
        self._work.put(work)

    def stop(self) -> None:
        """End the thread after its current step; what waits for it is not done."""
        self._stopping.set()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_waiting()
                if self._engine.wait(_IDLE_SECONDS):
                    events = self._engine.step()
                    self._listener.stepped(events, self._engine.take_failures())
                else:
                    self._listener.idle()
        except Exception:  # the listener must hear of it, whatever it is
            _logger.exception("the engine's thread ends")
        finally:
            self._listener.ended()

    def _run_waiting(self) -> None:
        while True:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            work()
