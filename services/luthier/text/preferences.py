"""Preference pairs as OpenAI and TRL write them, and TRL's answers with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from luthier.text.conversations import Turn, labelled, pair_of, read_label, require_question
from luthier.text.fields import RecordError, kind, objects, required_text
from luthier.text.openai_chat import ChatReader, check_parallel
from luthier.text.records import ChatPair, ChatRecord, CompletionPair, CompletionRecord
from luthier.text.tools import read_tools

_INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
_SAY_PROMPT = "write what both answer as prompt"


def parse_openai_pair(value: Mapping[str, Any]) -> ChatPair:
    """Read a record with `input`, `preferred_output` and `non_preferred_output`.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    given = value["input"]
    if not isinstance(given, Mapping):
        raise RecordError("input", "WRONG_TYPE", f"must be an object with messages, got {kind(given)}", given)
    for key in given:
        if key not in _INPUT_KEYS:
            description = f"must be one of {', '.join(_INPUT_KEYS)}, got {key!r}"
            raise RecordError(f"input.{key}", "UNKNOWN_FIELD", description, given[key])
    check_parallel(given.get("parallel_tool_calls"), "input.parallel_tool_calls")
    reader = ChatReader()
    asking = reader.read(given.get("messages"), "input.messages")
    chosen, rejected = (
        reader.fork().read(value[key], key) for key in ("preferred_output", "non_preferred_output")
    )
    return pair_of(asking, chosen, rejected, objects(given.get("tools"), "input.tools"))


def parse_pair(value: Mapping[str, Any]) -> ChatPair | CompletionPair:
    """Read a record with `chosen` and `rejected`, of texts or of messages, as TRL does.

    Where there is no `prompt` both hold the whole, and what they begin with in common is the prompt.

    Raises:
        RecordError: the first thing that is wrong with it, also where the prompt cannot be told.
    """
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    is_chat = isinstance(chosen, list)
    for key, given in (("chosen", chosen), ("rejected", rejected), ("prompt", prompt)):
        _require_alike(key, given, is_chat=is_chat, may_be_absent=key == "prompt")
    if not is_chat:
        _refuse_tools(value)
        return _text_pair(value) if prompt is not None else _split_texts(chosen, rejected)
    tools = read_tools(value.get("tools"), "tools")
    reader = ChatReader()
    if prompt is None:
        return _split_turns(
            reader.fork().read(chosen, "chosen"), reader.fork().read(rejected, "rejected"), tools
        )
    asking = reader.read(prompt, "prompt")
    return pair_of(
        asking, reader.fork().read(chosen, "chosen"), reader.fork().read(rejected, "rejected"), tools
    )


def parse_label(value: Mapping[str, Any]) -> ChatRecord | CompletionRecord:
    """Read a record with `prompt`, `completion` and a `label` that is true where the completion is desirable.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    prompt, completion = value["prompt"], value["completion"]
    is_chat = isinstance(completion, list)
    for key, given in (("completion", completion), ("prompt", prompt)):
        _require_alike(key, given, is_chat=is_chat)
    if not is_chat:
        _refuse_tools(value)
        text = required_text(completion, "completion")
        return CompletionRecord(prompt=prompt, completion=text, label=read_label(value["label"]))
    reader = ChatReader()
    asking, answer = reader.read(prompt, "prompt"), reader.read(completion, "completion")
    require_question(asking)
    if len(answer) > 1:
        description = f"must be one turn, as the label is of one answer, got {len(answer)}"
        raise RecordError("completion", "WRONG_VALUE", description)
    return labelled((*asking, *answer), value["label"], read_tools(value.get("tools"), "tools"))


def _require_alike(key: str, value: object, *, is_chat: bool, may_be_absent: bool = False) -> None:
    if (may_be_absent and value is None) or isinstance(value, list if is_chat else str):
        return
    wanted = "a list of messages" if is_chat else "text"
    reason = "MISSING_FIELD" if value is None else "WRONG_TYPE"
    raise RecordError(key, reason, f"must be {wanted}, as the others are, got {kind(value)}", value)


def _refuse_tools(value: Mapping[str, Any]) -> None:
    if value.get("tools"):
        raise RecordError(
            "tools", "WRONG_VALUE", "must not stand beside plain text, which has no place for them"
        )


def _text_pair(value: Mapping[str, Any]) -> CompletionPair:
    chosen, rejected = (required_text(value[key], key) for key in ("chosen", "rejected"))
    return CompletionPair(prompt=value["prompt"], chosen=chosen, rejected=rejected)


def _split_texts(chosen: str, rejected: str) -> CompletionPair:
    """Cut where the texts part, as TRL does: a space before that place belongs to the answers."""
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    cut = len(same)
    if cut in (len(chosen), len(rejected)):
        description = (
            f"must part before one of them ends, else nothing says where the answer begins: {_SAY_PROMPT}"
        )
        raise RecordError("rejected", "AMBIGUOUS_PROMPT", description, rejected)
    cut -= chosen[:cut].endswith(" ")
    if not chosen[:cut].strip():
        description = f"must begin with the text that chosen begins with, their prompt: {_SAY_PROMPT}"
        raise RecordError("rejected", "AMBIGUOUS_PROMPT", description, rejected)
    return CompletionPair(
        prompt=chosen[:cut],
        chosen=required_text(chosen[cut:], "chosen"),
        rejected=required_text(rejected[cut:], "rejected"),
    )


def _split_turns(
    chosen: Sequence[Turn], rejected: Sequence[Turn], tools: tuple[Mapping[str, Any], ...]
) -> ChatPair:
    """Cut where the conversations part, so that each side keeps at least its last turn."""
    same = takewhile(
        lambda pair: pair[0].message == pair[1].message, zip(chosen[:-1], rejected[:-1], strict=False)
    )
    cut = len(list(same))
    if not cut:
        description = f"must begin with the turns that chosen begins with, their prompt: {_SAY_PROMPT}"
        raise RecordError("rejected", "AMBIGUOUS_PROMPT", description)
    return pair_of(chosen[:cut], chosen[cut:], rejected[cut:], tools)
