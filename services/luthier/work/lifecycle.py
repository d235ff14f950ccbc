"""Which state of a resource may follow which."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from google.protobuf.descriptor import EnumDescriptor

from luthier.errors import FailedPrecondition

PREFIX = "STATE_"
_STOPPING = "STATE_CANCELLING"
_CANCELLED = "STATE_CANCELLED"


class Lifecycle:
    """The states of one family: a table of moves, and what follows from it."""

    def __init__(self, states: EnumDescriptor, moves: Mapping[int, Collection[int]]) -> None:
        """Args: the enum, and for each state those that may follow; a state that none follows is final."""
        assert set(moves) == set(states.values_by_number) - {0}, "every state stands in the table"
        self._states = states
        self._moves = moves

    @property
    def stopping(self) -> int:
        """The state of what was asked to stop until its worker has heard of it. Raises KeyError where there is none."""
        return int(self._states.values_by_name[_STOPPING].number)

    @property
    def cancelled(self) -> int:
        """The state of what stopped because it was asked to. Raises KeyError where there is none."""
        return int(self._states.values_by_name[_CANCELLED].number)

    def name(self, state: int) -> str:
        """Return a state without its prefix: QUEUED; one that newer code wrote, by its number."""
        known = self._states.values_by_number.get(state)
        return str(state) if known is None else known.name.removeprefix(PREFIX)

    def is_final(self, state: int) -> bool:
        """Tell whether a resource in this state never changes again; one that newer code wrote may."""
        return state in self._moves and not self._moves[state]

    def may_become(self, state: int, following: int) -> bool:
        """Tell whether a state may follow another."""
        return following in self._moves.get(state, ())

    def leading_to(self, *following: int) -> list[str]:
        """Return the names of the states that one of some may follow, in the order of the table."""
        return [self.name(state) for state, after in self._moves.items() if set(after) & set(following)]

    def require(self, name: str, state: int, following: int) -> None:
        """Raise FailedPrecondition WRONG_STATE unless the resource `name` in `state` may enter another one."""
        if self.may_become(state, following):
            return
        now = self.name(state)
        if self.is_final(state):
            message = f"{name} is {now} and never changes again"
        else:
            right = ", ".join(map(self.name, self._moves.get(state, ()))) or "nothing that this version knows"
            message = f"{name} is {now}; it can become {right}, not {self.name(following)}"
        raise FailedPrecondition(message, metadata={"name": name, "state": now})
