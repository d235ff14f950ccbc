"""What is asked for is checked at once, every fault with its value."""

from __future__ import annotations

import math

import pytest

from luthier.errors import InvalidArgument
from luthier.evaluation.generation.rules import check, resolved
from luthier.v1.chat_pb2 import ChatMessage, Conversation
from luthier.v1.evaluation_service_pb2 import GenerateTextRequest


def conversation(role: str = "user") -> Conversation:
    return Conversation(messages=[ChatMessage(role=role, content="hi")])


def wanted(**changes: object) -> GenerateTextRequest:
    fields = {"model": "projects/p/models/m", "max_new_tokens": 16, "top_p": 1.0, **changes}
    if "prompt" not in fields:
        fields.setdefault("conversation", conversation())
    return GenerateTextRequest(**fields)  # type: ignore[arg-type]


def test_a_good_wish_passes() -> None:
    check(wanted())
    check(wanted(prompt="once"))


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"conversation": Conversation()}, "input", "must be set"),
        ({"conversation": None}, "input", "must be set"),
        ({"prompt": ""}, "input", "must be set"),
        ({"conversation": conversation("assistant")}, "conversation.messages", "got role 'assistant'"),
        ({"max_new_tokens": 9000}, "max_new_tokens", "must be in 1..8192, got 9000"),
        ({"temperature": -1.0}, "temperature", "must be in 0..10, got -1.0"),
        ({"temperature": math.nan}, "temperature", "got nan"),
        ({"top_p": 1.5}, "top_p", "must be in (0, 1], got 1.5"),
    ],
)
def test_a_bad_wish_is_refused(changes: dict[str, object], field: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(wanted(**changes))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert said in caught.value.message


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(wanted(max_new_tokens=-1, top_p=0.0))
    assert len(caught.value.violations) == 2


def test_defaults_are_filled_in() -> None:
    request = GenerateTextRequest(model="m", conversation=conversation())
    filled = resolved(request)
    assert (filled.max_new_tokens, filled.temperature, filled.top_p) == (256, 0.0, 1.0)
    assert filled.conversation == request.conversation
    assert request.max_new_tokens == 0, "a message is never changed in place"
