"""The one thread that may touch a loaded model: it steps the engine and runs what others ask for in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from luthier.errors import AlreadyExists, Reason, Unavailable
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationEvent, GenerationRequest, TextAssembler

T = TypeVar("T")
_IDLE_SECONDS = 0.02
_CHECK_SECONDS = 0.1
Check = Callable[[], None]
"""Returns while the work is still wanted and raises when it is not."""
Decode = Callable[[Sequence[int], Check], str]
"""Turns token ids into text, for as long as it is wanted."""

_logger = logging.getLogger(__name__)


class EngineThread:
    """Runs an engine. Every method may be called from any thread but the engine's own.

    With `decode` events carry text. It is made in the thread that asked: a tokenizer that takes long holds up nobody
    else's tokens.
    """

    def __init__(self, engine: Engine, decode: Decode | None = None) -> None:
        self._engine = engine
        self._decode = decode
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._answers: dict[str, queue.SimpleQueue[GenerationEvent | Exception]] = {}
        self._admitting = threading.Lock()
        self._num_steps = 0
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_steps(self) -> int:
        """Steps so far, whoever asked for them: as long as it grows the engine works."""
        return self._num_steps

    def run(self, work: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return what it returns.

        Raises:
            Unavailable: SHUTTING_DOWN, the thread has ended.
        """
        done: Future[T] = Future()
        self._work.put((done, work))
        if self._stopped.is_set():
            self._refuse_waiting()
        return done.result()

    def generate(
        self, request: GenerationRequest, check: Check = lambda: None
    ) -> Generator[GenerationEvent, None, None]:
        """Yield what the rows of a request produce; closing the iterator, or a `check` that raises, cancels it.

        `check` is called before every event, and ten times a second while there is none.

        Raises:
            LuthierError: the request does not fit the model, or what `check` raised.
            AlreadyExists: a request of that id is running.
            Unavailable: SHUTTING_DOWN, the thread has ended.
        """
        answers = self._admit(request)
        remaining = len(request.prompts)
        texts: dict[int, TextAssembler] = {}
        try:
            while remaining:
                check()
                event = self._next(answers)
                if isinstance(event, Exception):
                    raise event
                if event is not None:
                    remaining -= event.finish_reason is not None
                    yield event if self._decode is None else _with_text(event, texts, self._decode, check)
        finally:
            with self._admitting:
                del self._answers[request.request_id]
            self._engine.cancel(request.request_id)

    def stop(self) -> None:
        """End the thread after its current step; what waits for it is told so."""
        self._stopping.set()
        self._thread.join()

    def _admit(self, request: GenerationRequest) -> queue.SimpleQueue[GenerationEvent | Exception]:
        answers: queue.SimpleQueue[GenerationEvent | Exception] = queue.SimpleQueue()
        # A step that fails in between must not take a request that is not yet submitted for the one it dropped.
        with self._admitting:
            if request.request_id in self._answers:
                raise AlreadyExists(f"a request with id {request.request_id!r} is running")
            self._engine.submit(request)
            self._answers[request.request_id] = answers
        return answers

    def _next(
        self, answers: queue.SimpleQueue[GenerationEvent | Exception]
    ) -> GenerationEvent | Exception | None:
        try:
            return answers.get(timeout=_CHECK_SECONDS)
        except queue.Empty:
            return _shutting_down() if self._stopped.is_set() else None

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_waiting()
                if self._engine.wait(_IDLE_SECONDS):
                    self._step()
        finally:
            self._stopped.set()
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                done, _ = self._work.get_nowait()
            except queue.Empty:
                return
            done.set_exception(_shutting_down())

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
        events = self._engine.step()
        self._num_steps += 1
        failures = self._engine.take_failures()
        with self._admitting:
            waiting = dict(self._answers)
        for event in events:
            if event.request_id in waiting:
                waiting[event.request_id].put(event)
        for request_id, error in failures.items():
            _logger.error("generation %s failed", request_id, exc_info=error)
            if request_id in waiting:
                waiting[request_id].put(error)


def _with_text(
    event: GenerationEvent, texts: dict[int, TextAssembler], decode: Decode, check: Check
) -> GenerationEvent:
    """Fill in the text that has become certain of the event's row."""
    assembler = texts.setdefault(event.row, TextAssembler(lambda ids: decode(ids, check)))
    text = "".join(assembler.push(token_id) for token_id in event.token_ids)
    if event.finish_reason is not None:
        text += assembler.finish()
    return replace(event, text=text)


def _shutting_down() -> Unavailable:
    return Unavailable("the model is being taken out of memory; try again", reason=Reason.SHUTTING_DOWN)
