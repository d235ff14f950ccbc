"""Renderings of pairs, labelled answers and prompts over a real port, by a real worker and its limited process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.data.made_records import chat, lines, table

from luthier.data.renderings import servicer
from luthier.errors import InvalidArgument, Reason
from luthier.errors.status import status_to_failure
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2

ASKED = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the question"}]


def turn(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def pair(number: int, chosen: str = "the answer", rejected: str = "another answer") -> dict[str, Any]:
    asked = [*ASKED[:-1], {"role": "user", "content": f"the question {number}"}]
    return {"prompt": asked, "chosen": turn(chosen), "rejected": turn(rejected)}


def labelled(number: int, *, label: bool) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"the question {number}"}]
    return {"prompt": asked, "completion": turn(f"answer {number}"), "label": label}


async def previewed(service: Any, name: str, **fields: Any) -> list[list[Any]]:
    """The rows of each page."""
    request = data_service_pb2.PreviewRenderingRequest(name=name, **fields)
    pages: list[list[Any]] = []
    while True:
        page = await service.call("PreviewRendering", request)
        pages.append(list(page.rows))
        if not page.next_page_token:
            return pages
        request.page_token = page.next_page_token


def text(row: Any, *, learnt: bool = False) -> str:
    return "".join(token.text for token in row.tokens if token.supervised or not learnt)


async def test_a_pair_is_previewed_with_both_sides_and_its_prompt_once(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(*(pair(number) for number in range(5))))
        rendering = await service.rendering(version.name, kind=rendering_pb2.RENDERING_KIND_PREFERENCE)
        supervised = await service.rendering(version.name)
    assert rendering.kind == rendering_pb2.RENDERING_KIND_PREFERENCE
    assert supervised.kind == rendering_pb2.RENDERING_KIND_SUPERVISED
    pages = await previewed(service, rendering.name, page_size=2)
    assert [[(row.unit, row.role) for row in page] for page in pages] == [
        [(0, "chosen"), (0, "rejected"), (2, "chosen"), (2, "rejected")],
        [(4, "chosen"), (4, "rejected"), (6, "chosen"), (6, "rejected")],
        [(8, "chosen"), (8, "rejected")],
    ]
    chosen, rejected = pages[0][:2]
    (alone, *_) = (await previewed(service, supervised.name))[0]
    assert [token.token_id for token in chosen.tokens] == [token.token_id for token in alone.tokens]
    assert text(chosen).endswith("<|im_start|>assistant\nthe answer<|im_end|>\n")
    assert text(chosen, learnt=True) == "the answer<|im_end|>"
    assert text(rejected) == "another answer<|im_end|>\n"
    assert text(rejected, learnt=True) == "another answer<|im_end|>"
    assert chosen.num_shared_tokens == 0
    shared = chosen.tokens[: rejected.num_shared_tokens]
    assert "".join(token.text for token in shared).endswith(
        "the question 0<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(rendering.stop_token_ids) == list(supervised.stop_token_ids)
    assert rendering.effective_chat_template == supervised.effective_chat_template


async def test_a_pair_that_is_too_long_for_a_page_is_shown_whole_on_two(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.worker():
        version = await service.version(lines(pair(0), pair(1)))
        rendering = await service.rendering(version.name, kind=rendering_pb2.RENDERING_KIND_PREFERENCE)
    monkeypatch.setattr(servicer, "PAGE_BYTES", 100)
    pages = await previewed(service, rendering.name, page_size=2)
    assert [[row.row for row in page] for page in pages] == [[0], [1], [2], [3]]
    assert [page[0].num_shared_tokens for page in pages] == [0, 0, 0, 0]
    assert text(pages[1][0]).endswith("<|im_start|>assistant\nanother answer<|im_end|>\n")


async def test_pairs_are_read_with_unit_and_role_and_counted_by_role(service: Any) -> None:
    records = [*(pair(number) for number in range(20)), pair(20, "same", "same")]
    async with service.worker():
        version = await service.version(
            lines(*records), split_settings=dataset_pb2.SplitSettings(validation_fraction=0.3)
        )
        rendering = await service.rendering(version.name, kind=rendering_pb2.RENDERING_KIND_PREFERENCE)
    whole = table(
        await service.stream("ReadRendering", data_service_pb2.ReadRenderingRequest(name=rendering.name))
    )
    assert whole.column_names[-2:] == ["unit", "role"]
    assert whole["role"].to_pylist() == ["chosen", "rejected"] * 21
    assert whole["unit"].to_pylist() == [number // 2 * 2 for number in range(42)]
    splits = whole["split"].to_pylist()
    assert splits[::2] == splits[1::2]
    assert sum(entry.num_units for entry in rendering.split_statistics) == 21
    for entry in rendering.split_statistics:
        assert [role.role for role in entry.roles] == ["chosen", "rejected"]
        assert sum(role.tokens.sum for role in entry.roles) == entry.tokens.sum
        assert entry.longest_unit_tokens > entry.tokens.maximum
    (finding,) = rendering.findings
    assert finding.kind == rendering_pb2.RenderingFinding.KIND_EQUAL_SIDES
    assert [(record.filename, record.line) for record in finding.records] == [("0.jsonl", 21)]
    ((equal, also),) = await previewed(service, rendering.name, unsupervised_only=True)
    assert (equal.line, text(equal, learnt=True), text(also)) == (21, "", "")
    assert also.num_shared_tokens == len(equal.tokens)


async def test_labelled_answers_are_previewed_with_their_label_and_the_answer_of_another(
    service: Any,
) -> None:
    async with service.worker():
        version = await service.version(
            lines(*(labelled(number, label=number % 2 == 0) for number in range(4)))
        )
        rendering = await service.rendering(version.name, kind=rendering_pb2.RENDERING_KIND_UNPAIRED)
    (page,) = await previewed(service, rendering.name)
    assert [row.role for row in page] == ["desirable", "mismatched", "undesirable", "mismatched"] * 2
    own = [text(row, learnt=True) for row in page[::2]]
    assert own == [f"answer {number}<|im_end|>" for number in range(4)]
    for row, answer in zip(page[1::2], own, strict=True):
        assert text(row, learnt=True) in set(own) - {answer}
        assert row.num_shared_tokens > 0
    assert rendering.warnings == []


async def test_prompts_are_read_with_their_records(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("the question", "the answer")), lines(pair(1)))
        rendering = await service.rendering(version.name, kind=rendering_pb2.RENDERING_KIND_PROMPT)
    request = data_service_pb2.ReadRenderingRequest(name=rendering.name)
    whole = table(await service.stream("ReadRendering", request))
    assert whole.column_names[-1] == "record"
    first, second = (json.loads(record) for record in whole["record"].to_pylist())
    assert first["messages"][-1] == {"content": "the answer", "role": "assistant"}
    assert (second["chosen"][0]["content"], second["rejected"][0]["content"]) == (
        "the answer",
        "another answer",
    )
    assert whole["role"].to_pylist() == ["prompt", "prompt"]
    request.view = data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
    assert "record" not in table(await service.stream("ReadRendering", request)).column_names
    ((prompt, _),) = await previewed(service, rendering.name)
    assert text(prompt) == "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt.role, text(prompt, learnt=True), rendering.warnings) == ("prompt", "", [])


async def test_a_version_that_does_not_suit_the_kind_fails_or_leaves_records_out(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q1", "a"), chat("q2", "a")), lines(pair(1)))
        kind = rendering_pb2.RENDERING_KIND_PREFERENCE
        strict = await service.rendering(version.name, kind=kind)
        policy = rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP
        skipping = await service.rendering(version.name, kind=kind, template_error_policy=policy)
    error = status_to_failure(strict.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.RENDERING_KIND_MISMATCH)
    assert error.message.startswith(
        "0.jsonl:1: a rendering of kind PREFERENCE needs pairs, got a conversation without a label; "
        "pass --kind supervised (kind SUPERVISED), or render a version of pairs"
    )
    assert "2 of 3 records cannot be rendered, as listed by ListRenderingErrors" in error.message
    assert error.metadata == {"filename": "0.jsonl", "line": "1"}
    for rendering in (strict, skipping):
        request = data_service_pb2.ListRenderingErrorsRequest(parent=rendering.name)
        page = await service.call("ListRenderingErrors", request)
        assert [(one.filename, one.line, one.reason) for one in page.errors] == [
            ("0.jsonl", 1, "RENDERING_KIND_MISMATCH"),
            ("0.jsonl", 2, "RENDERING_KIND_MISMATCH"),
        ]
    assert skipping.state == rendering_pb2.Rendering.STATE_READY
    assert skipping.warnings[0].startswith("2 records cannot be rendered and are left out")


@pytest.mark.parametrize(
    ("fields", "violation"),
    [
        (
            {"kind": rendering_pb2.RENDERING_KIND_PREFERENCE, "mask_mode": rendering_pb2.MASK_MODE_LAST_TURN},
            "rendering.mask_mode: must be unset where kind is PREFERENCE, in which the answer is learnt, got LAST_TURN",
        ),
        (
            {"kind": rendering_pb2.RENDERING_KIND_PROMPT, "mask_mode": rendering_pb2.MASK_MODE_COMPLETION},
            "rendering.mask_mode: must be unset where kind is PROMPT, in which nothing is learnt, got COMPLETION",
        ),
        (
            {"kind": rendering_pb2.RENDERING_KIND_UNPAIRED, "split_turns": True},
            "rendering.split_turns: must be false where kind is UNPAIRED",
        ),
        (
            {
                "kind": rendering_pb2.RENDERING_KIND_PROMPT,
                "length_policy": rendering_pb2.LENGTH_POLICY_TRUNCATE,
            },
            "rendering.length_policy: must be DROP or FAIL where kind is PROMPT",
        ),
        ({"kind": 77}, "rendering.kind: must be one of"),
    ],
)
async def test_what_does_not_go_with_a_kind_is_refused_by_name(
    service: Any, fields: dict[str, Any], violation: str
) -> None:
    wanted = rendering_pb2.Rendering(
        dataset_version="projects/default/datasets/d/versions/v",
        model="projects/default/models/base",
        **fields,
    )
    request = data_service_pb2.CreateRenderingRequest(parent="projects/default", rendering=wanted)
    with pytest.raises(InvalidArgument) as caught:
        await service.call("CreateRendering", request)
    assert violation in caught.value.message


# It never ends behind one side of a pair.
LOOPING = (
    "{% if messages[-1].content == 'bad' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


async def test_a_side_that_takes_too_much_is_named_and_costs_its_pair_alone(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(pair(1), pair(2, rejected="bad"), pair(3)))
        rendering = await service.rendering(
            version.name,
            kind=rendering_pb2.RENDERING_KIND_PREFERENCE,
            chat_template=LOOPING,
            template_error_policy=rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP,
        )
    assert rendering.state == rendering_pb2.Rendering.STATE_READY, rendering.error.message
    assert [entry.num_units for entry in rendering.split_statistics] == [2]
    assert rendering.warnings[0].startswith(
        "1 records cannot be rendered and are left out; the first is 0.jsonl:2: rendering takes more than"
    )
