"""Shapes of records that other tools use: named, with what to do, where they are refused."""

from __future__ import annotations

from collections.abc import Mapping

_PAIR = "rename {0} to instruction and {1} to output to have a conversation, to prompt and completion for plain text"
_OWN = (
    frozenset({"messages"}),
    frozenset({"conversations"}),
    frozenset({"prompt", "completion"}),
    frozenset({"chosen", "rejected"}),
    frozenset({"instruction", "output"}),
    frozenset({"question", "answer"}),
    frozenset({"preferred_output", "non_preferred_output"}),
)
# Messages that are a part of a record: alone they are no conversation.
_HALVES = ("prompt", "completion", "chosen", "rejected", "preferred_output", "non_preferred_output")
_PAIRS = (
    ("question", "response"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("query", "response"),
    ("query", "answer"),
)
# The first whose keys are all there.
_SHAPES: tuple[tuple[frozenset[str], str, str], ...] = (
    (
        frozenset({"custom_id", "body"}),
        "requests of OpenAI's Batch API",
        "write body.messages as messages, with the answer as the last turn",
    ),
    (
        frozenset({"contents"}),
        "Gemini's contents",
        "rename contents to messages, the role model to assistant, and write the text of parts as content",
    ),
    *((frozenset(pair), f"pairs of {pair[0]} and {pair[1]}", _PAIR.format(*pair)) for pair in _PAIRS),
    (
        frozenset({"text"}),
        "plain text",
        'no answer is marked in it: write it as completion, with an empty prompt (""), to learn all of it',
    ),
)


def named_shape(record: object) -> str | None:
    """Return the name of a record's shape and what to do with it; None when it is not known."""
    if not isinstance(record, Mapping):
        return None
    for key, inner in record.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
            shape = _list_shape(str(key), inner[0])
            if shape is not None:
                return shape
    for keys, name, advice in _SHAPES:
        if keys <= record.keys():
            return f"{name}: {advice}"
    return None


def _list_shape(key: str, first: Mapping[str, object]) -> str | None:
    keys = first.keys()
    if keys >= {"from", "value"}:
        return f"ShareGPT under another name: rename {key} to conversations"
    if keys >= {"role", "content"} and key not in {*_HALVES, "messages"}:
        return f"a conversation under another name: rename {key} to messages"
    if any(own <= keys for own in _OWN) or any(known <= keys for known, _, _ in _SHAPES):
        return f"one object that holds the records in {key!r}: write that list by itself"
    return None
