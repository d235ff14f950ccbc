"""A system prompt takes the place of the system turns that a conversation begins with, and of nothing else."""

from __future__ import annotations

import pytest

from luthier.text.instructions import instructed
from luthier.text.records import ChatRecord, CompletionRecord, Message
from luthier.text.rendering import RenderingError


def chat(*turns: tuple[str, str]) -> ChatRecord:
    return ChatRecord(
        messages=tuple(Message(role=role, content=content) for role, content in turns),
        tools=({"type": "function"},),
        label=True,
    )


@pytest.mark.parametrize("before", [(), (("system", "old"),), (("developer", "old"), ("system", "older"))])
def test_it_is_the_first_turn_and_the_rest_stays(before: tuple[tuple[str, str], ...]) -> None:
    rest = (("user", "a"), ("assistant", "b"), ("system", "from now on"), ("user", "c"), ("assistant", "d"))
    assert instructed(chat(*before, *rest), "new") == chat(("system", "new"), *rest)


def test_plain_text_has_no_turns() -> None:
    with pytest.raises(RenderingError, match="a system_prompt needs a conversation") as caught:
        instructed(CompletionRecord(prompt="a", completion="b"), "new")
    assert caught.value.reason == "INVALID_FIELD"
