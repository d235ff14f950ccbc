"""Records that a template refuses, and findings, as the service shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.data.renderings.test_servicer import PROJECT, chat, lines

from luthier.errors import (
    InvalidArgument,
    NotFound,
    Reason,
)
from luthier.v1 import data_service_pb2, rendering_pb2
from luthier.work.convert import status_to_failure

if TYPE_CHECKING:
    pass


REFUSING = (
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('not ' + m.content) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def listed_errors(service: Any, name: str, page_size: int) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    request = data_service_pb2.ListRenderingErrorsRequest(parent=name, page_size=page_size)
    while True:
        page = await service.call("ListRenderingErrors", request)
        found += ((error.filename, error.line, error.reason) for error in page.errors)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def test_refused_records_are_all_listed_and_left_out_where_that_is_asked_for(service: Any) -> None:
    records = [chat(f"bad {number}" if number % 2 else f"q{number}", "a") for number in range(6)]
    wanted = [("0.jsonl", line, "TEMPLATE_INVALID") for line in (2, 4, 6)]
    async with service.worker():
        version = await service.version(lines(*records))
        strict = await service.rendering(version.name, chat_template=REFUSING)
        policy = rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP
        skipping = await service.rendering(version.name, chat_template=REFUSING, template_error_policy=policy)
        clean = await service.rendering(version.name)
    assert strict.state == rendering_pb2.Rendering.STATE_FAILED
    error = status_to_failure(strict.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.TEMPLATE_INVALID)
    assert error.message.startswith("0.jsonl:2: the chat template fails: not bad 1")
    assert "3 of 6 records cannot be rendered, as listed by ListRenderingErrors" in error.message
    assert strict.template_error_policy == rendering_pb2.TEMPLATE_ERROR_POLICY_STRICT
    assert skipping.state == rendering_pb2.Rendering.STATE_READY
    assert skipping.template_error_policy == policy
    counts = skipping.split_statistics[0]
    assert (counts.num_records, counts.num_refused, counts.tokens.count) == (6, 3, 3)
    for rendering in (strict, skipping):
        assert rendering.num_errors == 3
        assert await listed_errors(service, rendering.name, 2) == wanted
    assert await listed_errors(service, clean.name, 0) == []
    with pytest.raises(NotFound):
        await listed_errors(service, f"{PROJECT}/renderings/none", 0)
    with pytest.raises(InvalidArgument, match=r"rendering\.template_error_policy: must be one of"):
        await service.rendering(version.name, template_error_policy=99)


async def test_conversations_become_rows_by_answer_and_findings_are_told(service: Any) -> None:
    talk = {"messages": [*chat("q1", "a1")["messages"], *chat("q2", "a2")["messages"]]}
    dropping = REFUSING.replace("{{ m.content }}", "{{ m.content if m.content != 'q2' else '' }}")
    async with service.worker():
        version = await service.version(lines(talk, chat("q3", "a3")))
        rendering = await service.rendering(version.name, chat_template=dropping, split_turns=True)
    assert rendering.state == rendering_pb2.Rendering.STATE_READY
    assert rendering.split_turns
    page = await service.call(
        "PreviewRendering", data_service_pb2.PreviewRenderingRequest(name=rendering.name, page_size=10)
    )
    assert [row.line for row in page.rows] == [1, 1, 2]
    assert page.rows[0].record_id == page.rows[1].record_id
    learnt = ["".join(token.text for token in row.tokens if token.supervised) for row in page.rows]
    assert learnt == ["a1<|im_end|>", "a2<|im_end|>", "a3<|im_end|>"]
    (finding,) = rendering.findings
    assert finding.kind == rendering_pb2.RenderingFinding.KIND_TURN_NOT_WRITTEN
    assert finding.num_records == 1
    (record,) = finding.records
    assert (record.filename, record.line) == ("0.jsonl", 1)
    assert record.message == "message 2 (user): its text is missing"
    (warning,) = rendering.warnings
    assert warning.startswith("in 1 record the chat template leaves out text of a turn")
    assert warning.endswith("the first is 0.jsonl:1: message 2 (user): its text is missing")
