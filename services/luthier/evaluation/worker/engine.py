"""A base model that others compute with: what may be asked of it, wherever it is. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Protocol

from luthier.errors import AlreadyExists, LuthierError
from luthier.evaluation.worker.order import (
    COMPARE,
    DISTRIBUTE,
    GENERATE,
    LOAD_ADAPTER,
    LOAD_REWARD,
    MEASURE,
    REMOVE_ADAPTER,
    UNFIT,
    VALUES,
    Facts,
    LoadOrder,
    Measured,
    Said,
    Valued,
)
from luthier.lm.generate import GenerationEvent, GenerationRequest, TextAssembler
from luthier.lm.score import SequenceDivergence, SequenceScore
from luthier.work.child_watch import Patience
from luthier.work.children import Children
from luthier.work.limited import Check
from luthier.work.standing import Log, Requests, Standing

PATIENCE = Patience(first_seconds=1500.0, silent_seconds=900.0)
"""With processes that hold a model: a piece of a long prompt takes minutes on a slow processor, a token far less."""
Decode = Callable[[Sequence[int], Check], str]
"""Turns token ids into text, for as long as it is wanted."""


class Place(Protocol):
    """Where a base model is: it takes requests until it ends, and its memory is gone then.

    Attributes:
        requests: what is asked of it.
    """

    requests: Requests

    def begun(self, check: Check = lambda: None) -> Facts:
        """Return what the model says of itself once it is loaded. Raises why it cannot be, or what `check` raised."""
        ...

    def reporting(self, log: Log) -> AbstractContextManager[None]:
        """Report to `log`, for the length of a block, where it was at if it crashes or hangs."""
        ...

    def close(self) -> None:
        """End it, whatever it does."""
        ...


Start = Callable[[LoadOrder], Place]
"""Begins to load a base model."""


def in_children(children: Children) -> Start:
    """Return what loads each base model in a process of its own, one of `children`."""

    def start(order: LoadOrder) -> Place:
        return Standing(children, order)

    return start


class EngineClient:
    """Asks a base model. For any thread, of many at once.

    With `decode` events carry text. It is made in the thread that asked: a tokenizer that takes long holds up nobody
    else's tokens.

    Every method calls its `check` ten times a second, and raises what that raises, what the model refused, or why its
    process ended: Unavailable with CRASHED, STALLED or SHUTTING_DOWN, ResourceExhausted with OUT_OF_MEMORY.
    """

    def __init__(self, place: Place, decode: Decode | None = None) -> None:
        self._place = place
        self._requests = place.requests
        self._decode = decode
        self._ids: set[str] = set()
        self._lock = threading.Lock()

    @property
    def num_steps(self) -> int:
        """Pieces of work done so far, whoever asked for them: as long as it grows the engine works."""
        return self._requests.num_steps

    @property
    def ended(self) -> LuthierError | None:
        """Why it answers no more; None: it does."""
        return self._requests.ended

    def generate(
        self, request: GenerationRequest, check: Check = lambda: None
    ) -> Generator[GenerationEvent, None, None]:
        """Yield what the rows of a request produce; closing the iterator, or a `check` that raises, cancels it.

        Raises:
            LuthierError: the request does not fit the model.
            AlreadyExists: a request of that id is running.
        """
        texts: dict[int, TextAssembler] = {}
        with (
            self._only(request.request_id),
            closing(self._requests.stream(GENERATE, (request,), check)) as parts,
        ):
            for part in parts:
                for said in part:
                    yield self._event(request.request_id, said, texts, check)

    def unfit(
        self, requests: Sequence[GenerationRequest], check: Check = lambda: None
    ) -> list[LuthierError | None]:
        """Return why the model would refuse each of some requests; None: it would not."""
        found: list[LuthierError | None] = self._requests.call(UNFIT, (requests,), check)
        return found

    def measure(self, wanted: Measured, check: Check = lambda: None) -> list[SequenceScore]:
        """Return the log-probability of chosen tokens of sequences."""
        scores: list[SequenceScore] = self._requests.call(MEASURE, (wanted,), check)
        return scores

    def distribute(self, wanted: Measured, path: Path, check: Check = lambda: None) -> None:
        """Write what the model thinks of each word at chosen tokens of sequences to a file."""
        self._requests.call(DISTRIBUTE, (wanted, path), check)

    def divergences(
        self, wanted: Measured, path: Path, check: Check = lambda: None
    ) -> list[SequenceDivergence]:
        """Return how far the model's distributions at chosen tokens lie from those of a file."""
        found: list[SequenceDivergence] = self._requests.call(COMPARE, (wanted, path), check)
        return found

    def values(self, wanted: Valued, check: Check = lambda: None) -> list[float]:
        """Return what a reward model values sequences at, each alone; it may not be finite."""
        found: list[float] = self._requests.call(VALUES, (wanted,), check)
        return found

    def load_reward(self, folder: Path, name: str, check: Check = lambda: None) -> None:
        """Put a reward model's adapter into the model with its head, unless there is one of that name."""
        self._requests.call(LOAD_REWARD, (folder, name), check)

    def load_adapter(self, folder: Path, name: str, check: Check = lambda: None) -> None:
        """Put the adapter of a folder into the model, unless there is one of that name."""
        self._requests.call(LOAD_ADAPTER, (folder, name), check)

    def remove_adapter(self, name: str, check: Check = lambda: None) -> None:
        """Take an adapter out of the model."""
        self._requests.call(REMOVE_ADAPTER, (name,), check)

    def reporting(self, log: Log) -> AbstractContextManager[None]:
        """Report to `log`, for the length of a block, where the engine was at if it crashes or hangs."""
        return self._place.reporting(log)

    def close(self) -> None:
        """Take the model out of memory, whatever it does; what waits for it is told so."""
        self._place.close()

    @contextmanager
    def _only(self, request_id: str) -> Iterator[None]:
        with self._lock:
            if request_id in self._ids:
                raise AlreadyExists(f"a request with id {request_id!r} is running")
            self._ids.add(request_id)
        try:
            yield
        finally:
            with self._lock:
                self._ids.remove(request_id)

    def _event(
        self, request_id: str, said: Said, texts: dict[int, TextAssembler], check: Check
    ) -> GenerationEvent:
        return GenerationEvent(
            request_id=request_id,
            row=said.row,
            token_ids=said.token_ids,
            text="" if self._decode is None else _text(said, texts, self._decode, check),
            num_generated=said.num_generated,
            finish_reason=said.finish_reason,
        )


def _text(said: Said, texts: dict[int, TextAssembler], decode: Decode, check: Check) -> str:
    """Return the text of a row that has become certain."""
    assembler = texts.setdefault(said.row, TextAssembler(lambda ids: decode(ids, check)))
    text = "".join(assembler.push(token_id) for token_id in said.token_ids)
    return text if said.finish_reason is None else text + assembler.finish()
