"""Turns as templates see them: arguments are objects, and still text for templates that join them to text."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from luthier.text.templates import ChatTemplate
from luthier.text.turns import template_turns, text_arguments

TODAY = datetime.date(2026, 3, 9)
TEXT = '{"symbol": "XYZ", "days": 1.50, "who": "ü"}'


def calling(arguments: Any, **outer: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "price", "arguments": arguments}, **outer}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


def shown(source: str, messages: list[dict[str, Any]]) -> str:
    template = ChatTemplate("{% set a = messages[0].tool_calls[0].function.arguments %}" + source, TODAY)
    return template.render(template_turns(messages)).text


@pytest.mark.parametrize("arguments", [TEXT, json.loads(TEXT)])
@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ a | tojson }}", TEXT.replace("1.50", "1.5")),
        ("{{ a.symbol }}{{ a['days'] }}{{ a is mapping }}{{ a is string }}", "XYZ1.5TrueFalse"),
        ("{% for key, value in a.items() %}{{ key }}={{ value }};{% endfor %}", "symbol=XYZ;days=1.5;who=ü;"),
    ],
)
def test_arguments_are_an_object(arguments: Any, source: str, wanted: str) -> None:
    assert shown(source, calling(arguments)) == wanted


@pytest.mark.parametrize(
    "source",
    ["{{ a }}", "{{ '' ~ a }}", "{{ '' + a }}", "{{ a + '' }}", "{{ a | string }}", "{{ '%s' | format(a) }}"],
)
def test_templates_that_join_arguments_to_text_get_json(source: str) -> None:
    assert shown(source, calling(TEXT)) == TEXT
    assert shown(source, calling(json.loads(TEXT))) == TEXT.replace("1.50", "1.5")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[1]",
        '"text"',
        "null",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        '{"a": "\\ud800"}',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_object_stays_text_and_is_named(text: str) -> None:
    messages = calling(text)
    assert shown("{{ a }}", messages) == text
    assert list(text_arguments(messages)) == [(0, text[:60])]


def test_calls_without_a_function_or_arguments_go_on() -> None:
    flat = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}, {"id": "x"}, "odd"]}]
    first, *rest = template_turns(flat)[0]["tool_calls"]
    assert first == {"name": "f", "arguments": {"a": 1}}
    assert rest == [{"id": "x"}, "odd"]
    assert list(text_arguments(flat)) == []
    assert template_turns([{"role": "user", "content": "hi", "tool_calls": "odd"}])[0]["tool_calls"] == "odd"


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = calling(TEXT)
    template_turns(messages)
    assert messages == calling(TEXT)
