"""Worked examples before what is asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from luthier.text.records import SYSTEM_ROLES, ChatRecord, CompletionRecord, Message, SingleRecord
from luthier.text.spans import RenderingError


def with_shots(record: ChatRecord, shots: Sequence[SingleRecord]) -> ChatRecord:
    """Return a conversation with others between its system turn and the rest; their own system turns are left out.

    Raises:
        RenderingError: a shot is no conversation.
    """
    systems = tuple(itertools.takewhile(lambda message: message.role in SYSTEM_ROLES, record.messages))
    turns: list[Message] = []
    for shot in shots:
        if not isinstance(shot, ChatRecord):
            raise RenderingError("INVALID_FIELD", "examples before a conversation must be conversations")
        turns += [message for message in shot.messages if message.role not in SYSTEM_ROLES]
    own = record.messages[len(systems) :]
    return ChatRecord(messages=(*systems, *turns, *own), tools=record.tools)


def prompt_with_shots(record: CompletionRecord, shots: Sequence[SingleRecord]) -> str:
    """Return a prompt behind others with their completions.

    Raises:
        RenderingError: a shot is a conversation.
    """
    parts: list[str] = []
    for shot in shots:
        if not isinstance(shot, CompletionRecord):
            raise RenderingError(
                "INVALID_FIELD", "examples before a prompt must be prompt-completion records"
            )
        parts.append(f"{shot.prompt}{shot.completion}\n\n")
    return "".join(parts) + record.prompt
