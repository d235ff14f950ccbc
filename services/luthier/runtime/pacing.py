"""Calls that run leave turns of the event loop to calls that come, while more of them wait than are seen.

gRPC takes in one call of a method at a time, in a chain of turns of the loop. Where calls that run take most of each
turn, those that come wait inside gRPC, for seconds, before anybody could refuse them.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar, cast

_CHAIN_TURNS = 6
_MOST_TURNS = 6 * _CHAIN_TURNS
_CROWDED_SECONDS = 0.25
_FLOODED_SECONDS = 0.05
_PROBE_SECONDS = 0.02

T = TypeVar("T")
StepsAside = Callable[[int], bool]
"""By number of turns left to others since a call's own last one: whether to leave them the next one too."""


@dataclass(slots=True, eq=False)
class Traffic:
    """What is known of the calls that come to a server.

    Attributes:
        arrivals: how many came.
        crowded_at: when more came than could be taken.
        probed_at: when it was last tried out whether more wait outside.
        flooded_at: when more still waited outside after a running call had left as many turns as it may.
    """

    arrivals: int = 0
    crowded_at: float = -math.inf
    probed_at: float = -math.inf
    flooded_at: float = -math.inf

    def is_flooded(self, now: float) -> bool:
        """Tell whether calls come faster than they are taken in beside those that run."""
        return now - self.flooded_at < _FLOODED_SECONDS


class StepAside:
    """Tells a call that runs whether to leave the next turn of the loop to calls that come.

    gRPC takes in one call of a method at a time, in a chain of turns; those that wait for that are seen by nobody.
    So now and then a call that runs leaves two chains of turns to others: when two calls come in them, more wait
    outside. Then every call that runs leaves chains of turns after each of its own, as long as in each one comes.
    """

    def __init__(self, traffic: Traffic, clock: Callable[[], float] = monotonic) -> None:
        self._traffic = traffic
        self._clock = clock
        self._seen = 0
        self._is_probe = False

    def __call__(self, turn: int) -> bool:
        """Say it of turn number `turn`, from 0, since the call's own last one."""
        if turn == 0:
            return self._begins(self._clock())
        if turn % _CHAIN_TURNS or (self._is_probe and turn < 2 * _CHAIN_TURNS):
            return True
        traffic = self._traffic
        came, self._seen = traffic.arrivals - self._seen, traffic.arrivals
        if self._is_probe:
            self._is_probe = False
            if came < 2:
                return False
            traffic.crowded_at = self._clock()
        if came and turn >= _MOST_TURNS:
            traffic.flooded_at = self._clock()
        return came > 0 and turn < _MOST_TURNS

    def _begins(self, now: float) -> bool:
        traffic = self._traffic
        self._seen = traffic.arrivals
        if now - traffic.crowded_at < _CROWDED_SECONDS:
            return True
        self._is_probe = now - traffic.probed_at > _PROBE_SECONDS
        if self._is_probe:
            traffic.probed_at = now
        return self._is_probe


class Paced(Awaitable[T]):
    """A coroutine that leaves turns of the event loop to others after each of its own, while it is told to.

    gRPC takes in one call of a method at a time, in several turns of the loop. Where calls that run take most of
    each turn, those that come wait unseen inside gRPC, for seconds, before anybody can refuse them.
    """

    def __init__(self, work: Coroutine[Any, Any, T], steps_aside: StepsAside) -> None:
        self._work = work
        self._steps_aside = steps_aside

    def __await__(self) -> Generator[Any, Any, T]:
        """Run the coroutine, in the task that awaits."""
        error: BaseException | None = None
        while True:
            try:
                waits_for = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration as end:
                return cast("T", end.value)
            error = None
            try:
                yield waits_for
                turn = 0
                while self._steps_aside(turn):
                    turn += 1
                    yield
            except BaseException as raised:  # cancellation among them: it is the coroutine's to handle
                error = raised
