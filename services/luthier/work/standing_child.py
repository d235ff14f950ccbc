"""The inside of a child that stays: many ask it at the same time, and each hears its own answers.

`luthier.work.standing` asks it. A request is answered in as many parts as whoever answers it likes, of which one is the
last; of a request that is stopped nothing but the last part is waited for. Parts of several requests that are ready at
the same time travel as one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from luthier.work.child import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Something that is asked of a child, under a number that no other request of it has."""

    number: int
    name: str
    arguments: Sequence[Any] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Nobody wants to know more of a request. It is heard of once more, when the child has let go of it."""

    number: int


class Part(NamedTuple):
    """A part of the answer to a request; the last one may be an error."""

    number: int
    value: Any = None
    is_last: bool = True
    error: Exception | None = None


class Answering(Protocol):
    """What answers requests."""

    def ask(self, request: Request) -> None:
        """Begin to answer. What cannot be is said in a part of the answer."""
        ...

    def stop(self, number: int) -> None:
        """Let go of a request, if it is under way, and say its last part."""
        ...


class Speaker:
    """Tells the driver how a child that stays goes on. For any thread."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def begun(self, facts: Any) -> None:
        """Say that requests may come."""
        self._line.tell("begun", (facts,))

    def say(self, parts: Sequence[Part]) -> None:
        """Say parts of answers."""
        self._line.tell("say", (parts,))

    def step(self, parts: Sequence[Part]) -> None:
        """Say that a piece of the work is done, and the parts of answers that it made, if any."""
        self._line.tell("step", (parts,))

    def idle(self) -> None:
        """Say that there is nothing to do. Call it often: it costs nothing."""
        self._line.idle()


def answer_requests(line: Line, answering: Answering) -> None:
    """Hand on what the driver asks, for as long as it lives and wants this process."""
    while True:
        message: Request | Stop = line.next()
        if isinstance(message, Request):
            answering.ask(message)
        else:
            answering.stop(message.number)
