"""Records that a template refuses, and findings, as the service shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.data.made_records import chat, lines
from tests.data.renderings.test_servicer import PROJECT

from luthier.data.worker.refusals import MAX_AT_LIMIT
from luthier.errors import (
    InvalidArgument,
    NotFound,
    Reason,
)
from luthier.errors.status import status_to_failure
from luthier.v1 import data_service_pb2, rendering_pb2

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


TAKING = (
    "{% for m in messages %}"
    "{% if 'slow' in m.content %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if 'large' in m.content %}{{ 'x' * 9999999999 }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def test_a_record_beyond_a_limit_is_refused_like_others_where_they_are_left_out(service: Any) -> None:
    service.limits = replace(service.limits, cpu_seconds=1)
    records = [chat(question, "a") for question in ("q0", "slow", "q2", "large", "q4")]
    fields = {
        "chat_template": TAKING,
        "template_error_policy": rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP,
    }
    async with service.worker():
        version = await service.version(lines(*records))
        rendering = await service.rendering(version.name, **fields)
        without = await service.version(lines(*records[::2]), dataset="others")
        plain = await service.rendering(without.name, **fields)
    assert rendering.state == rendering_pb2.Rendering.STATE_READY, rendering.error
    counts = rendering.split_statistics[0]
    assert (counts.num_records, counts.num_refused, counts.tokens.count) == (5, 2, 3)
    assert counts.tokens == plain.split_statistics[0].tokens
    request = data_service_pb2.ListRenderingErrorsRequest(parent=rendering.name)
    errors = (await service.call("ListRenderingErrors", request)).errors
    assert [(error.line, error.reason, error.message) for error in errors] == [
        (2, "TEMPLATE_INVALID", "rendering takes more than 1 s of CPU time"),
        (4, "TEMPLATE_INVALID", "rendering takes more than 512 MiB of memory"),
    ]


async def test_many_records_beyond_a_limit_end_a_rendering_with_their_count(service: Any) -> None:
    service.limits = replace(service.limits, cpu_seconds=1)
    records = [chat(f"large {number}", "a") for number in range(MAX_AT_LIMIT + 3)]
    async with service.worker():
        version = await service.version(lines(chat("q", "a"), *records))
        policy = rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP
        rendering = await service.rendering(version.name, chat_template=TAKING, template_error_policy=policy)
        strict = await service.rendering(version.name, chat_template=TAKING)
    error = status_to_failure(rendering.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.TEMPLATE_INVALID)
    assert error.message == (
        "0.jsonl:2: rendering takes more than 512 MiB of memory; 6 records take more than a limit allows, at most 5 "
        "are left out; pass a chat_template without unbounded loops; 6 of the first 7 records cannot be rendered, as "
        "listed by ListRenderingErrors"
    )
    assert error.metadata == {"filename": "0.jsonl", "line": "2", "num_at_limit": "6"}
    assert [line for _, line, _ in await listed_errors(service, rendering.name, 0)] == [2, 3, 4, 5, 6, 7]
    assert strict.num_errors == 1  # nobody waits for more of them
