"""What is asked for is checked at once, every fault with its value."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from luthier.errors import InvalidArgument
from luthier.evaluation.generation.convert import wish_from_proto
from luthier.evaluation.generation.domain import Turn, Wish, check_wish
from luthier.v1 import chat_pb2, evaluation_service_pb2

WISH = Wish(
    model="projects/p/models/m",
    turns=(Turn(role="user", content="hi"),),
    tools_json="",
    prompt="",
    max_new_tokens=16,
    temperature=0.0,
    top_p=1.0,
    seed=0,
)


def test_a_good_wish_passes() -> None:
    check_wish(WISH)
    check_wish(replace(WISH, turns=(), prompt="once"))


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"turns": ()}, "input", "must be set"),
        ({"turns": (Turn(role="assistant", content="x"),)}, "conversation.messages", "got role 'assistant'"),
        ({"max_new_tokens": 9000}, "max_new_tokens", "must be in 1..8192, got 9000"),
        ({"temperature": -1.0}, "temperature", "must be in 0..10, got -1.0"),
        ({"temperature": math.nan}, "temperature", "got nan"),
        ({"top_p": 1.5}, "top_p", "must be in (0, 1], got 1.5"),
    ],
)
def test_a_bad_wish_is_refused(changes: dict[str, object], field: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_wish(replace(WISH, **changes))  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]
    assert said in caught.value.message


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_wish(replace(WISH, max_new_tokens=-1, top_p=0.0))
    assert len(caught.value.violations) == 2


def test_defaults_are_filled_in() -> None:
    request = evaluation_service_pb2.GenerateTextRequest(model="m")
    request.conversation.messages.append(chat_pb2.ChatMessage(role="user", content="hi"))
    wish = wish_from_proto(request)
    assert (wish.max_new_tokens, wish.temperature, wish.top_p) == (256, 0.0, 1.0)
