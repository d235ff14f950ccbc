"""A system prompt in place of a conversation's own."""

from __future__ import annotations

import itertools

from luthier.text.records import SYSTEM_ROLES, ChatRecord, Message, SingleRecord
from luthier.text.spans import RenderingError


def instructed(record: SingleRecord, system_prompt: str) -> SingleRecord:
    """Return a conversation that begins with this system turn in place of those that it begins with.

    Raises:
        RenderingError: INVALID_FIELD, the record is plain text, which has no turns.
    """
    if not isinstance(record, ChatRecord):
        raise RenderingError(
            "INVALID_FIELD",
            "a system_prompt needs a conversation to stand before, the record is a prompt and its completion",
        )
    own = itertools.dropwhile(lambda message: message.role in SYSTEM_ROLES, record.messages)
    return ChatRecord(
        messages=(Message(role="system", content=system_prompt), *own), tools=record.tools, label=record.label
    )
