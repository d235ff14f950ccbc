"""The one thread that may touch a loaded model: it steps the engine and runs what others ask for in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationEvent, GenerationRequest

T = TypeVar("T")
_IDLE_SECONDS = 0.02
_logger = logging.getLogger(__name__)


class EngineThread:
    """Runs an engine. Every method may be called from any thread but the engine's own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._answers: dict[str, queue.SimpleQueue[GenerationEvent | Exception]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return what it returns."""
        done: Future[T] = Future()
        self._work.put((done, work))
        return done.result()

    def generate(self, request: GenerationRequest) -> Generator[GenerationEvent, None, None]:
        """Yield what the rows of a request produce; closing the iterator cancels it.

        Raises:
            LuthierError: the request does not fit the model.
        """
        answers: queue.SimpleQueue[GenerationEvent | Exception] = queue.SimpleQueue()
        self._answers[request.request_id] = answers
        remaining = len(request.prompts)
        try:
            self._engine.submit(request)
            while remaining:
                event = answers.get()
                if isinstance(event, Exception):
                    raise event
                remaining -= event.finish_reason is not None
                yield event
        finally:
            self._answers.pop(request.request_id, None)
            self._engine.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """End a request; its rows finish as CANCELLED."""
        self._engine.cancel(request_id)

    def stop(self) -> None:
        """End the thread after its current step."""
        self._stopping.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._run_waiting()
            if self._engine.wait(_IDLE_SECONDS):
                self._step()

    def _run_waiting(self) -> None:
        while True:
            try:
                done, work = self._work.get_nowait()
            except queue.Empty:
                return
            try:
                done.set_result(work())
            except Exception as error:  # it belongs to whoever asked
                done.set_exception(error)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # the engine dropped the request that failed; the others go on
            _logger.exception("a generation failed")
            running = self._engine.running()
            for request_id, answers in list(self._answers.items()):
                if request_id not in running:
                    answers.put(error)
            return
        for event in events:
            waiting = self._answers.get(event.request_id)
            if waiting is not None:
                waiting.put(event)
