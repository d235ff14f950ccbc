"""Turns on their way from a file to a record: each with its place, and the orders that no template could use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from luthier.text.fields import RecordError, kind
from luthier.text.records import ChatPair, ChatRecord, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn, and the path of what says who speaks, e.g. messages[2].role."""

    message: Message
    role_path: str

    @property
    def role(self) -> str:
        """Who speaks."""
        return self.message.role

    @property
    def path(self) -> str:
        """Path of the turn, e.g. messages[2]."""
        return self.role_path.rpartition(".")[0]


class TurnReader(Protocol):
    """Reads the turns of one conversation, one list behind the other."""

    def read(self, values: object, path: str) -> tuple[Turn, ...]:
        """Return the turns of a list with at least one. Raises RecordError."""
        ...

    def read_one(self, value: object, path: str) -> Turn:
        """Return one turn, which stands at a path by itself. Raises RecordError."""
        ...

    def fork(self) -> Self:
        """Return a reader of what follows the turns read so far; this one stays as it is."""
        ...


def turn_values(values: object, path: str) -> list[Any]:
    """Return the turns of a conversation's JSON. Raises RecordError unless it is a list with at least one."""
    if not isinstance(values, list) or not values:
        raise RecordError(path, "WRONG_TYPE", "must be a list with at least one message", values)
    return values


def messages_of(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Return the turns without their places."""
    return tuple(turn.message for turn in turns)


def call_id_of(turn: int, number: int = 0) -> str:
    """Return the id of a call whose file gives it none, by its turn and its number among that turn's calls.

    It has nine letters and digits: the only ids that Mistral's templates take.
    """
    return f"c{number:03}{turn:05}" if number else f"call{turn:05}"


def check_results(turns: Sequence[Turn]) -> None:
    """Raise RecordError for a result of a tool that nobody called. What a template cannot write its rendering says."""
    for index, turn in enumerate(turns):
        before = turns[index - 1] if index else None
        if turn.role != "tool" or (before and (before.message.tool_calls or before.role == "tool")):
            continue
        raise _wrong_order(turn, "tool must follow an assistant that calls it")


def require_answer(turns: Sequence[Turn]) -> None:
    """Raise RecordError unless the last turn is an assistant's."""
    last = turns[-1]
    if last.role != "assistant":
        raise _wrong_order(
            last,
            f"the last turn must be assistant, got {last.role}: what follows the last answer teaches nothing",
        )


def pair_of(
    asking: Sequence[Turn],
    chosen: Sequence[Turn],
    rejected: Sequence[Turn],
    tools: tuple[Mapping[str, Any], ...],
) -> ChatPair:
    """Return a conversation with two answers, which may be equal.

    Weights that say what is so in any pair are left out: that the turns before the answers are not learnt, that the
    answers are.

    Raises:
        RecordError: the prompt ends with an answer, a side is none, or a weight says otherwise.
    """
    require_question(asking)
    for side in (chosen, rejected):
        require_answer_first(side)
        require_answer(side)
        check_results([*asking, *side])
    return ChatPair(
        messages=weightless(asking, learnt=False),
        chosen=weightless(chosen, learnt=True),
        rejected=weightless(rejected, learnt=True),
        tools=tools,
    )


def labelled(turns: Sequence[Turn], label: object, tools: tuple[Mapping[str, Any], ...] = ()) -> ChatRecord:
    """Return a conversation whose last turn is an answer with a label. Raises RecordError."""
    require_answer(turns)
    check_results(turns)
    messages = (*weightless(turns[:-1], learnt=False), *weightless(turns[-1:], learnt=True))
    return ChatRecord(messages=messages, tools=tools, label=read_label(label))


def read_label(value: object) -> bool:
    """Return whether an answer is desirable. Raises RecordError unless it is true or false."""
    if isinstance(value, bool):
        return value
    reason = "MISSING_FIELD" if value is None else "WRONG_TYPE"
    description = f"must be true (desirable) or false, got {kind(value)}"
    raise RecordError("label", reason, description, value)


def require_question(asking: Sequence[Turn]) -> None:
    """Raise RecordError where the last turn of a prompt is an assistant's."""
    if asking[-1].role == "assistant":
        raise _wrong_order(
            asking[-1],
            "the prompt must end with a turn that asks, got assistant: whether an answer goes on with that turn or "
            "follows it is not said",
        )


def require_answer_first(side: Sequence[Turn]) -> None:
    """Raise RecordError unless the first turn is an assistant's."""
    first = side[0]
    if first.role != "assistant":
        raise _wrong_order(first, f"an answer must begin with an assistant's turn, got {first.role}")


def weightless(turns: Sequence[Turn], *, learnt: bool) -> tuple[Message, ...]:
    """Return messages without weights. Raises RecordError where a weight says the contrary of `learnt`."""
    for turn in turns:
        weight = turn.message.weight
        if weight is not None and (weight != 0) != learnt:
            wanted = (
                "1 or not be there: the answers are" if learnt else "0 or not be there: only the answers are"
            )
            raise RecordError(f"{turn.path}.weight", "WRONG_VALUE", f"must be {wanted} learnt from", weight)
    return tuple(replace(turn.message, weight=None) for turn in turns)


def _wrong_order(turn: Turn, description: str) -> RecordError:
    return RecordError(turn.role_path, "WRONG_ROLE_ORDER", description, turn.role)
