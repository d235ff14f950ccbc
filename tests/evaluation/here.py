"""A base model in this very process, for tests that are about something else than processes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar

from luthier.errors import Reason, Unavailable
from luthier.evaluation.worker.computing import Computing, loaded
from luthier.evaluation.worker.order import Facts, LoadOrder
from luthier.evaluation.worker.room import Room
from luthier.work.limited import Check
from luthier.work.standing import Log, Requests
from luthier.work.standing_child import Part, Request, Stop

T = TypeVar("T")


class Here:
    """Computes as a process of its own does, and is asked in the same words: a `Place`."""

    computing: Computing

    def __init__(self, order: LoadOrder) -> None:
        self._order = order
        self._inbox: SimpleQueue[bytes] = SimpleQueue()
        self._answering = threading.Thread(target=self._answer, name="here", daemon=True)
        self.requests = Requests(lambda message: self._inbox.put(pickle.dumps(message)))

    def begun(self, check: Check = lambda: None) -> Facts:
        check()
        model, facts, head = loaded(self._order, "cpu")
        self.computing = Computing(model, self, self._ended, head)
        self._answering.start()
        return facts

    def reporting(self, log: Log) -> AbstractContextManager[None]:
        del log
        return nullcontext()

    def close(self) -> None:
        if self._answering.is_alive():
            self.computing.thread.stop()
            self._inbox.put(pickle.dumps(None))
            self._answering.join()

    def run(self, work: Callable[[], T]) -> T:
        """Run a function in the thread of the engine, and return what it returns."""
        done: Future[T] = Future()
        self.computing.thread.run(lambda: done.set_result(work()))
        return done.result()

    def say(self, parts: Sequence[Part]) -> None:
        self.requests.say(pickle.loads(pickle.dumps(parts)))

    def step(self, parts: Sequence[Part]) -> None:
        self.requests.step(pickle.loads(pickle.dumps(parts)))

    def idle(self) -> None:
        """Nobody watches."""

    def _ended(self) -> None:
        self.requests.end(
            Unavailable("the model is being taken out of memory; try again", reason=Reason.SHUTTING_DOWN)
        )

    def _answer(self) -> None:
        message: Any
        while (message := pickle.loads(self._inbox.get())) is not None:
            if isinstance(message, Request):
                self.computing.ask(message)
            else:
                assert isinstance(message, Stop)
                self.computing.stop(message.number)


NO_ROOM = Room(fits=lambda needed_bytes, held_bytes: False, is_short=lambda: False)
"""Of which a model takes all."""
