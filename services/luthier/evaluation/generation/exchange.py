"""Where callers' orders for text meet workers with free slots. In memory: a restart ends all generations."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from luthier.errors import Failure, NotFound, Reason, ResourceExhausted, Unavailable
from luthier.evaluation.generation.domain import Order, Piece
from luthier.runtime.names import project_of

MAX_WAITING = 64
RETRY_AFTER_SECONDS = 1.0


@dataclass(slots=True)
class _Taker:
    """A worker that takes orders: `outbox` holds orders, and ids of generations to stop.

    `active` holds the orders that it has by id, `silent` the ids of those that it said nothing of yet.
    """

    slots: int
    active: dict[str, Order] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    outbox: asyncio.Queue[Order | str] = field(default_factory=asyncio.Queue)

    def hand(self, order: Order) -> None:
        """Give it an order."""
        self.active[order.generation_id] = order
        self.silent.add(order.generation_id)
        self.outbox.put_nowait(order)

    def drop(self, generation_id: str) -> None:
        """Take an order back, if it has it."""
        self.active.pop(generation_id, None)
        self.silent.discard(generation_id)

    def choose(self, waiting: Iterable[Order]) -> Order | None:
        """Return whose turn it is: of the project that has the fewest orders here, then who came first.

        Of one model at most all slots but one may be silent: its template may not end before its limits do, and
        others must find a slot meanwhile.
        """
        silent = Counter(_asked(self.active[generation_id]) for generation_id in self.silent)
        held = Counter(_project(order) for order in self.active.values())
        most = max(1, self.slots - 1)
        may = [order for order in waiting if silent[_asked(order)] < most]
        return min(may, key=lambda order: held[_project(order)], default=None)


class Exchange:
    """Hands each order to a worker with a free slot and its pieces back to the caller.

    At most `max_waiting` orders wait for a slot; see `_Taker.choose` for whose turn it is. When a caller goes away its
    generation is stopped; when a worker goes away its callers are told to try again.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[Order] = deque()
        self._takers: list[_Taker] = []
        self._answers: dict[str, asyncio.Queue[Piece]] = {}

    async def generate(self, order: Order) -> AsyncIterator[Piece]:
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
        self._answers[order.generation_id] = answers
        self._waiting.append(order)
        self._dispatch()
        try:
            while True:
                piece = await answers.get()
                if piece.failure is not None:
                    raise piece.failure.to_error()
                yield piece
                if piece.is_last:
                    return
        finally:
            self._forget(order)

    def _forget(self, order: Order) -> None:
        self._answers.pop(order.generation_id, None)
        if order in self._waiting:
            self._waiting.remove(order)
        for taker in self._takers:
            if order.generation_id in taker.active:
                taker.drop(order.generation_id)
                taker.outbox.put_nowait(order.generation_id)
        self._dispatch()

    async def take(self, slots: int) -> AsyncIterator[Order | str]:
        """Yield orders to answer, and ids of generations to stop, until the worker goes away."""
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
                left_alone |= {order.generation_id for order in self._waiting}
                self._waiting.clear()
            gone = Failure(
                code="UNAVAILABLE", reason=Reason.NO_WORKER, message="the worker went away; try again"
            )
            for generation_id in left_alone & self._answers.keys():
                piece = Piece(generation_id=generation_id, text="", failure=gone)
                self._answers[generation_id].put_nowait(piece)

    def push(self, piece: Piece) -> None:
        """Pass a piece on to its caller.

        Raises:
            NotFound: nobody waits for it any more.
        """
        answers = self._answers.get(piece.generation_id)
        if answers is None:
            raise NotFound(
                f"nobody waits for generation {piece.generation_id!r}; stop it",
                metadata={"generation": piece.generation_id},
            )
        answers.put_nowait(piece)
        for taker in self._takers:
            taker.silent.discard(piece.generation_id)
            if piece.is_last:
                taker.drop(piece.generation_id)
        self._dispatch()

    def _dispatch(self) -> None:
        for taker in self._takers:
            while len(taker.active) < taker.slots and (order := taker.choose(self._waiting)) is not None:
                self._waiting.remove(order)
                taker.hand(order)


def _asked(order: Order) -> str:
    return (order.adapter or order.base_model).name


def _project(order: Order) -> str:
    return project_of(order.base_model.name)
