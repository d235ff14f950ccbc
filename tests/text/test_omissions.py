"""Omissions: what a template drops is named, what it only writes in another way is not."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from tests.text.conftest import CALLS, CHATML, THINKING, make_bundle

from luthier.text.records import ChatRecord, Message
from luthier.text.rendering import Finding, FindingKind, Renderer

TODAY = datetime.date(2026, 3, 9)
TOOL = {"type": "function", "function": {"name": "price", "parameters": {"properties": {"symbol": {}}}}}


def omitted(template: str, *messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> list[str]:
    record = ChatRecord(messages=messages, tools=tools)
    findings: tuple[Finding, ...] = Renderer(make_bundle(template), today=TODAY).render(record).findings
    return [one.message for one in findings if one.kind is FindingKind.TURN_NOT_WRITTEN]


def turn(role: str, content: str, **fields: Any) -> Message:
    return Message(role=role, content=content, **fields)


def call(arguments: Any, name: str = "price") -> Message:
    return turn(
        "assistant", "", tool_calls=({"id": "1", "function": {"name": name, "arguments": arguments}},)
    )


def writing(content: str) -> str:
    """A template that writes contents by an expression."""
    body = f"{{{{ '<|im_start|>' + m.role + '\n' }}}}{{{{ {content} }}}}{{{{ '<|im_end|>\n' }}}}"
    asking = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return f"{{% for m in messages %}}{body}{{% endfor %}}{asking}"


def test_a_dropped_system_turn_is_named() -> None:
    template = CHATML.replace(
        "{{ '<|im_start|>' + m", "{% if message.role != 'system' %}{{ '<|im_start|>' + m"
    )
    template = template.replace("+ '\n' }}{% endfor %}", "+ '\n' }}{% endif %}{% endfor %}")
    said = omitted(template, turn("system", "Be brief."), turn("user", "hi"), turn("assistant", "ho"))
    assert said == ["message 0 (system): its text is missing"]


def test_a_turn_that_only_stands_inside_another_is_named() -> None:
    template = writing("m.content if m.role != 'system' else ''")
    said = omitted(template, turn("system", "answer"), turn("user", "the answer?"), turn("assistant", "ho"))
    assert said == ["message 0 (system): its text is missing"]
    twice = (turn("user", "same"), turn("assistant", "a"), turn("user", "same"), turn("assistant", "b"))
    dropping = writing("m.content if not loop.first else ''")
    # Which of two equal texts is gone cannot be seen.
    assert omitted(dropping, *twice) == ["message 2 (user): its text is missing"]
    assert omitted(CHATML, *twice) == []


def test_stripped_thoughts_are_named() -> None:
    template = writing("m.content.split('</think>')[-1]")
    said = omitted(template, turn("user", "a"), turn("assistant", "<think>why</think>b"))
    assert said == ["message 1 (assistant): its text is missing"]
    assert omitted(THINKING, turn("user", "a"), turn("assistant", "<think>why</think>b")) == []


@pytest.mark.parametrize(
    "content",
    [
        "m.content | trim",
        "m.content | tojson",
        "m.content | e",
        "m.content | indent(2)",
        "m.content | wordwrap(10)",
    ],
)
def test_other_ways_to_write_a_text_are_no_omission(content: str) -> None:
    text = '  Say "ü" & <b>\n\tit\'s all there, line by line\n'
    assert omitted(writing(content), turn("user", text), turn("assistant", "ho " + text)) == []


@pytest.mark.parametrize("arguments", ['{"symbol": "XYZ", "days": 2}', {"symbol": "XYZ", "days": 2}])
def test_calls_that_are_written_are_no_omission(arguments: Any) -> None:
    said = (
        turn("user", "XYZ?"),
        call(arguments),
        turn("tool", "12", tool_call_id="1"),
        turn("assistant", "12."),
    )
    assert omitted(CALLS, *said, tools=(TOOL,)) == []


def test_calls_that_are_dropped_are_named_though_their_names_stand_elsewhere() -> None:
    asked = (turn("user", "the price of XYZ?"), call(json.dumps({"symbol": "XYZ"})))
    dropping = CALLS.replace("in m.tool_calls", "in []")
    assert omitted(dropping, *asked, tools=(TOOL,)) == [
        "message 1 (assistant): the name of its tool call 'price' is missing"
    ]
    nameless = CALLS.replace("c.function.name", "'price'")
    assert omitted(nameless, *asked, tools=(TOOL,)) == [
        "message 1 (assistant): the name of its tool call 'price' is missing"
    ]
    silent = CALLS.replace("c.function.arguments | tojson", "{'symbol': 'XYZ'} | tojson")
    assert omitted(silent, *asked, tools=(TOOL,)) == [
        "message 1 (assistant): an argument of its tool call 'price' is missing"
    ]


def test_tools_that_no_template_writes_are_named() -> None:
    asked = (turn("user", "XYZ?"), turn("assistant", "12"))
    assert omitted(CHATML, *asked, tools=(TOOL,)) == ["tools: none of them is written"]
    assert omitted(CALLS, *asked, tools=(TOOL,)) == []
    needing = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + CALLS
    assert omitted(needing, *asked, tools=(TOOL,)) == []


def test_a_template_that_takes_no_other_names_is_asked_for_these() -> None:
    strict = "{% for m in messages %}{% for c in m.tool_calls %}{% if c.function.name != 'price' %}"
    strict += "{{ raise_exception('unknown') }}{% endif %}{% endfor %}{% endfor %}"
    asked = (turn("user", "XYZ?"), call({"symbol": "XYZ"}))
    assert omitted(strict + CALLS, *asked) == []
    assert omitted(strict + CALLS.replace("in m.tool_calls", "in []"), *asked) == [
        "message 1 (assistant): the name of its tool call 'price' is missing"
    ]
