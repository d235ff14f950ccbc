"""The formats that examples come in: recognised by their keys, read strictly into canonical records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from luthier.text.fields import RecordError, kind, optional_text, required_text
from luthier.text.foreign import named_shape
from luthier.text.openai_chat import parse_chat
from luthier.text.preferences import parse_label, parse_openai_pair, parse_pair
from luthier.text.records import ChatRecord, CompletionRecord, Message, Record
from luthier.text.sharegpt import parse_sharegpt, parse_sharegpt_label, parse_sharegpt_pair

_SHOWN_KEYS = 20
_SHOWN_CHARACTERS = 60


class Format(StrEnum):
    """Shape of the records of a file. The names are those of the API."""

    OPENAI_CHAT = "OPENAI_CHAT"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"
    ALPACA = "ALPACA"
    SHAREGPT = "SHAREGPT"
    PREFERENCE_OPENAI = "PREFERENCE_OPENAI"
    PREFERENCE = "PREFERENCE"
    SHAREGPT_PREFERENCE = "SHAREGPT_PREFERENCE"
    UNPAIRED = "UNPAIRED"
    SHAREGPT_UNPAIRED = "SHAREGPT_UNPAIRED"
    QUESTION_ANSWER = "QUESTION_ANSWER"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """Keys of a format's records: those that each has, of which it has one, and that it may have."""

    required: frozenset[str]
    one_of: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()

    def fit(self, keys: Set[str]) -> bool:
        return self.required <= keys and (not self.one_of or not keys.isdisjoint(self.one_of))

    def missing(self, keys: Set[str]) -> str | None:
        if self.fit(keys):
            return None
        return min(self.required - keys, default=self.one_of[0] if self.one_of else None)

    def __str__(self) -> str:
        return ", ".join([*sorted(self.required), *([" or ".join(self.one_of)] if self.one_of else [])])


_CONVERSATION = ("conversations", "messages")
_BESIDE_CONVERSATION = frozenset({"system", "tools", "id"})
# Those with more keys come first: what an answer is worth must not be passed over.
_KEYS: Mapping[Format, _Keys] = {
    Format.PREFERENCE_OPENAI: _Keys(
        required=frozenset({"input", "preferred_output", "non_preferred_output"})
    ),
    Format.SHAREGPT_PREFERENCE: _Keys(
        required=frozenset({"chosen", "rejected"}), one_of=_CONVERSATION, optional=_BESIDE_CONVERSATION
    ),
    Format.PREFERENCE: _Keys(
        required=frozenset({"chosen", "rejected"}), optional=frozenset({"prompt", "tools"})
    ),
    Format.UNPAIRED: _Keys(
        required=frozenset({"prompt", "completion", "label"}), optional=frozenset({"tools"})
    ),
    Format.SHAREGPT_UNPAIRED: _Keys(
        required=frozenset({"label"}), one_of=_CONVERSATION, optional=_BESIDE_CONVERSATION
    ),
    Format.SHAREGPT: _Keys(required=frozenset({"conversations"}), optional=_BESIDE_CONVERSATION),
    Format.OPENAI_CHAT: _Keys(
        required=frozenset({"messages"}),
        optional=frozenset({"tools", "parallel_tool_calls", "functions", "metadata"}),
    ),
    Format.PROMPT_COMPLETION: _Keys(required=frozenset({"prompt", "completion"})),
    Format.ALPACA: _Keys(
        required=frozenset({"instruction", "output"}), optional=frozenset({"input", "system", "history"})
    ),
    Format.QUESTION_ANSWER: _Keys(required=frozenset({"question", "answer"})),
}


_ALLOWED = {name: keys.required | keys.optional | frozenset(keys.one_of) for name, keys in _KEYS.items()}


class UnknownFormatError(ValueError):
    """The records have the keys of no format.

    The message names the keys found, what they are elsewhere where that is known, and the formats known here.
    """


def detect(objects: Sequence[object]) -> Format:
    """Return the format of the first record that has the keys of one; of several formats the one with more keys.

    Raises:
        UnknownFormatError: no format fits, or there is no record.
    """
    for record in objects:
        found = _format_of(record)
        if found is not None:
            return found
    first = objects[0] if objects else None
    shown = _shown(first) if isinstance(first, Mapping) else type(first).__name__
    known = "; ".join(f"{name}: {_KEYS[name]}" for name in Format)
    shape = next(filter(None, map(named_shape, objects)), None)
    advice = f"; this looks like {shape}" if shape else ""
    raise UnknownFormatError(f"no known format has the keys found ({shown}){advice}; known are {known}")


def _format_of(record: object) -> Format | None:
    keys = record.keys() if isinstance(record, Mapping) else ()
    return next((format_ for format_, wanted in _KEYS.items() if wanted.fit(set(keys))), None)


def _shown(keys: Iterable[str]) -> str:
    """Return keys as a message can hold them: the first ones, shortened, nothing in them that steers a terminal."""
    names = sorted(keys)
    short = [
        key if len(key) <= _SHOWN_CHARACTERS else f"{key[:_SHOWN_CHARACTERS]}…" for key in names[:_SHOWN_KEYS]
    ]
    more = [f"and {len(names) - _SHOWN_KEYS} more"] if len(names) > _SHOWN_KEYS else []
    return ", ".join([*(key if key.isprintable() else repr(key) for key in short), *more])


def parse_record(value: object, format_: Format) -> Record:
    """Read one JSON value as a record.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise RecordError("", "WRONG_TYPE", f"a record must be a JSON object, got {kind(value)}", value)
    keys = _KEYS[format_]
    missing = keys.missing(value.keys())
    if missing is not None:
        message = f"must be there; the record has {_shown(value)}{_likeness(value, format_)}"
        raise RecordError(missing, "MISSING_FIELD", message)
    allowed = _ALLOWED[format_]
    for key in value:
        if key not in allowed:
            message = f"must be one of {', '.join(sorted(allowed))}, got {key!r}{_likeness(value, format_)}"
            raise RecordError(str(key), "UNKNOWN_FIELD", message, value[key])
    return _PARSERS[format_](value)


def _likeness(record: Mapping[str, Any], format_: Format) -> str:
    """Return what else a record looks like, as the end of a sentence; empty where nobody knows."""
    found = _format_of(record)
    if found is not None and found is not format_:
        return f"; this looks like {found}: all records of a file have one format, here {format_}"
    shape = named_shape(record)
    return f"; this looks like {shape}" if shape else ""


def _parse_completion(value: Mapping[str, Any]) -> CompletionRecord:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, str):
        raise RecordError("prompt", "WRONG_TYPE", f"must be text, got {kind(prompt)}", prompt)
    return CompletionRecord(prompt=prompt, completion=required_text(completion, "completion"))


def _parse_alpaca(value: Mapping[str, Any]) -> ChatRecord:
    instruction = required_text(value["instruction"], "instruction")
    given = optional_text(value.get("input"), "input") or ""
    output = required_text(value["output"], "output")
    messages: list[Message] = []
    system = optional_text(value.get("system"), "system")
    if system:
        messages.append(Message(role="system", content=required_text(system, "system")))
    history = value.get("history")
    if history is not None and not isinstance(history, list):
        problem = f"must be a list of [question, answer], got {kind(history)}"
        raise RecordError("history", "WRONG_TYPE", problem, history)
    for index, turn in enumerate(history or ()):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RecordError(f"history[{index}]", "WRONG_TYPE", "must be [question, answer]", turn)
        for role, text in zip(("user", "assistant"), turn, strict=True):
            content = required_text(text, f"history[{index}]")
            messages.append(Message(role=role, content=content))
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=output))
    return ChatRecord(messages=tuple(messages))


def _parse_question(value: Mapping[str, Any]) -> ChatRecord:
    turns = (("user", "question"), ("assistant", "answer"))
    return ChatRecord(
        messages=tuple(Message(role=role, content=required_text(value[key], key)) for role, key in turns)
    )


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any]], Record]] = {
    Format.OPENAI_CHAT: parse_chat,
    Format.PROMPT_COMPLETION: _parse_completion,
    Format.ALPACA: _parse_alpaca,
    Format.SHAREGPT: parse_sharegpt,
    Format.PREFERENCE_OPENAI: parse_openai_pair,
    Format.PREFERENCE: parse_pair,
    Format.SHAREGPT_PREFERENCE: parse_sharegpt_pair,
    Format.UNPAIRED: parse_label,
    Format.SHAREGPT_UNPAIRED: parse_sharegpt_label,
    Format.QUESTION_ANSWER: _parse_question,
}

__all__ = ["Format", "RecordError", "UnknownFormatError", "detect", "parse_record"]
