"""Where callers' orders for text meet workers with free slots. In memory: a restart ends all generations."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from luthier.errors import Failure, NotFound, Reason, ResourceExhausted, Unavailable
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.evaluation.generation.metrics import GenerationMetrics
from luthier.evaluation.generation.rules import is_last
from luthier.runtime.names import project_of
from luthier.worker.v1.worker_service_pb2 import (
    GenerationOrder,
    PushGenerationRequest,
    TakeGenerationsResponse,
)

MAX_WAITING = 64
RETRY_AFTER_SECONDS = 1.0
Piece = PushGenerationRequest
"""A piece of an answer, as its worker brings it; the last one has a finish reason or an error."""


@dataclass(slots=True)
class _Taker:
    """A worker that takes orders: `outbox` is what it is yet to hear.

    `active` holds the orders that it has by id, `silent` the ids of those that it said nothing of yet.
    """

    slots: int
    active: dict[str, GenerationOrder] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    outbox: asyncio.Queue[TakeGenerationsResponse] = field(default_factory=asyncio.Queue)

    def hand(self, order: GenerationOrder) -> None:
        """Give it an order."""
        self.active[order.generation] = order
        self.silent.add(order.generation)
        self.outbox.put_nowait(TakeGenerationsResponse(order=order))

    def drop(self, generation: str) -> None:
        """Take an order back, if it has it."""
        self.active.pop(generation, None)
        self.silent.discard(generation)

    def choose(self, waiting: Iterable[GenerationOrder]) -> GenerationOrder | None:
        """Return whose turn it is: of the project that has the fewest orders here, then who came first.

        Of one model at most all slots but one may be silent: its template may not end before its limits do, and
        others must find a slot meanwhile.
        """
        silent = Counter(_asked(self.active[generation]) for generation in self.silent)
        held = Counter(_project(order) for order in self.active.values())
        most = max(1, self.slots - 1)
        may = [order for order in waiting if silent[_asked(order)] < most]
        return min(may, key=lambda order: held[_project(order)], default=None)


class Exchange:
    """Hands each order to a worker with a free slot and its pieces back to the caller.

    At most `max_waiting` orders wait for a slot; see `_Taker.choose` for whose turn it is. When a caller goes away its
    generation is stopped; when a worker goes away its callers are told to try again.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, metrics: GenerationMetrics | None = None) -> None:
        self._max_waiting = max_waiting
        self._metrics = metrics or GenerationMetrics(CollectorRegistry())
        self._waiting: deque[GenerationOrder] = deque()
        self._takers: list[_Taker] = []
        self._answers: dict[str, asyncio.Queue[Piece]] = {}
        self._metrics.follow(
            lambda: len(self._waiting), lambda: sum(len(taker.active) for taker in tuple(self._takers))
        )

    async def generate(self, order: GenerationOrder) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer, the last one with its finish reason.

        Raises:
            Unavailable: NO_WORKER, nobody takes orders, or the worker went away.
            ResourceExhausted: OVERLOADED, too many orders wait.
            LuthierError: what the worker could not do.
        """
        if not self._takers:
            raise Unavailable(
                "no evaluation worker takes orders for text; start one with `luthierd worker evaluation`",
                reason=Reason.NO_WORKER,
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if len(self._waiting) >= self._max_waiting:
            raise ResourceExhausted(
                f"{len(self._waiting)} generations wait for a free worker, the limit is {self._max_waiting}",
                reason=Reason.OVERLOADED,
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        answers: asyncio.Queue[Piece] = asyncio.Queue()
        self._answers[order.generation] = answers
        self._waiting.append(order)
        self._dispatch()
        timing = self._metrics.begun()
        try:
            while True:
                piece = await answers.get()
                timing.take(piece)
                if piece.HasField("error"):
                    raise status_to_failure(piece.error).to_error()
                yield piece
                if is_last(piece):
                    return
        finally:
            timing.end()
            self._forget(order)

    def _forget(self, order: GenerationOrder) -> None:
        self._answers.pop(order.generation, None)
        if order in self._waiting:
            self._waiting.remove(order)
        for taker in self._takers:
            if order.generation in taker.active:
                taker.drop(order.generation)
                taker.outbox.put_nowait(TakeGenerationsResponse(cancel_generation=order.generation))
        self._dispatch()

    async def take(self, worker: str, slots: int) -> AsyncGenerator[TakeGenerationsResponse, None]:
        """Yield orders to answer, and ids of generations to stop, until the worker goes away."""
        del worker
        taker = _Taker(slots=max(slots, 1))
        self._takers.append(taker)
        self._dispatch()
        try:
            while True:
                yield await taker.outbox.get()
        finally:
            self._takers.remove(taker)
            left_alone = set(taker.active)
            if not self._takers:
                left_alone |= {order.generation for order in self._waiting}
                self._waiting.clear()
            gone = Failure(
                code="UNAVAILABLE", reason=Reason.NO_WORKER, message="the worker went away; try again"
            )
            for generation in left_alone & self._answers.keys():
                piece = Piece(generation=generation, error=failure_to_status(gone))
                self._answers[generation].put_nowait(piece)

    async def push(self, piece: Piece) -> None:
        """Pass a piece on to its caller.

        Raises:
            NotFound: nobody waits for it any more.
        """
        answers = self._answers.get(piece.generation)
        if answers is None:
            raise NotFound(
                f"nobody waits for generation {piece.generation!r}; stop it",
                metadata={"generation": piece.generation},
            )
        answers.put_nowait(piece)
        for taker in self._takers:
            taker.silent.discard(piece.generation)
            if is_last(piece):
                taker.drop(piece.generation)
        self._dispatch()

    def _dispatch(self) -> None:
        for taker in self._takers:
            while len(taker.active) < taker.slots and (order := taker.choose(self._waiting)) is not None:
                self._waiting.remove(order)
                taker.hand(order)


def _asked(order: GenerationOrder) -> str:
    return order.adapter.name if order.HasField("adapter") else order.base_model.name


def _project(order: GenerationOrder) -> str:
    return project_of(order.base_model.name)
