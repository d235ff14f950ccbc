"""The whole Data service over real ports, with a real worker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest

from luthier.errors import (
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Reason,
    Unauthenticated,
    Unavailable,
)
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2
from luthier.work.convert import status_to_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECT = "projects/default"


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def chat(question: str, answer: str, **message: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **message},
        ]
    }


def table(chunks: Sequence[Any]) -> Any:
    batches = [batch for chunk in chunks for batch in pyarrow.ipc.open_stream(chunk.ipc)]
    return pyarrow.Table.from_batches(batches)


async def test_the_whole_path_from_upload_to_preview(service: Any) -> None:
    records = [chat(f"the question {number}", f"the answer {number}") for number in range(20)]
    async with service.worker():
        version = await service.version(
            lines(*records), split_settings=dataset_pb2.SplitSettings(test_fraction=0.3, seed=1)
        )
        assert version.state == dataset_pb2.DatasetVersion.STATE_READY
        assert version.sources[0].detected_format == dataset_pb2.DATASET_FORMAT_OPENAI_CHAT
        assert version.statistics.num_records == 20
        rendering = await service.rendering(version.name)
    assert rendering.state == rendering_pb2.Rendering.STATE_READY
    assert rendering.max_tokens == 512
    assert [split.split for split in rendering.split_statistics] == [1, 3]
    preview = await service.call(
        "PreviewRendering", data_service_pb2.PreviewRenderingRequest(name=rendering.name)
    )
    assert len(preview.rows) == 5
    first = preview.rows[0]
    assert "".join(token.text for token in first.tokens) == (
        "<|im_start|>user\nthe question 0<|im_end|>\n<|im_start|>assistant\nthe answer 0<|im_end|>\n"
    )
    learnt = "".join(token.text for token in first.tokens if token.supervised)
    assert learnt == "the answer 0<|im_end|>"


async def test_records_are_listed_by_page_and_split(service: Any) -> None:
    async with service.worker():
        version = await service.version(
            lines(*({"prompt": f"q{number}", "completion": f"a{number}"} for number in range(30))),
            split_settings=dataset_pb2.SplitSettings(test_fraction=0.4, seed=3),
        )
    found: list[Any] = []
    request = data_service_pb2.ListRecordsRequest(parent=version.name, page_size=7)
    while True:
        page = await service.call("ListRecords", request)
        found += page.records
        assert len(page.records) <= 7
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [record.row for record in found] == list(range(30))
    assert found[4].prompt_completion.prompt == "q4"
    tests = await service.call(
        "ListRecords",
        data_service_pb2.ListRecordsRequest(parent=version.name, split=dataset_pb2.SPLIT_TEST),
    )
    expected = [record.row for record in found if record.split == dataset_pb2.SPLIT_TEST]
    assert [record.row for record in tests.records] == expected
    assert 0 < len(expected) < 30
    request.split = dataset_pb2.SPLIT_TEST
    request.page_token = (await service.call("ListRecords", request_of(version.name, 7))).next_page_token
    with pytest.raises(InvalidArgument) as caught:
        await service.call("ListRecords", request)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID


def request_of(version: str, page_size: int) -> Any:
    return data_service_pb2.ListRecordsRequest(parent=version, page_size=page_size)


async def test_read_records_resumes_at_any_row_in_chunks_of_a_mebibyte(service: Any) -> None:
    records = [{"prompt": f"q{number}", "completion": "x" * 3000} for number in range(1500)]
    async with service.worker():
        version = await service.version(lines(*records), lines({"prompt": "last", "completion": "y"}))
    request = data_service_pb2.ReadRecordsRequest(name=version.name)
    chunks = await service.stream("ReadRecords", request)
    whole = table(chunks)
    assert whole.column_names == ["row", "record_id", "split", "filename", "line", "record"]
    assert whole["row"].to_pylist() == list(range(1501))
    assert len(chunks) > 3
    assert max(len(chunk.ipc) for chunk in chunks) < 1.1 * (1 << 20)
    assert [chunk.first_row for chunk in chunks][1] == chunks[0].num_rows
    for start in (1, chunks[1].first_row, 1024, 1500):
        request.start_row = start
        assert table(await service.stream("ReadRecords", request)).equals(whole.slice(start))
    request.start_row = 1501
    assert await service.stream("ReadRecords", request) == []
    request.start_row = 1502
    with pytest.raises(OutOfRange, match=r"start_row must be in 0\.\.1501, got 1502"):
        await service.stream("ReadRecords", request)


async def test_read_rendering_gives_rows_or_lengths_and_resumes(service: Any) -> None:
    records = [chat(f"the question {number}", "the answer " * (number % 5 + 1)) for number in range(40)]
    async with service.worker():
        version = await service.version(
            lines(*records), split_settings=dataset_pb2.SplitSettings(validation_fraction=0.3)
        )
        rendering = await service.rendering(version.name)
    request = data_service_pb2.ReadRenderingRequest(name=rendering.name)
    whole = table(await service.stream("ReadRendering", request))
    assert whole.column_names == [
        "row",
        "record_id",
        "split",
        "filename",
        "line",
        "input_ids",
        "loss_mask",
    ]
    assert str(whole.schema.field("input_ids").type).startswith("list<")
    request.view = data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
    lengths = table(await service.stream("ReadRendering", request))
    assert lengths.column_names == ["row", "split", "num_tokens", "num_supervised"]
    assert lengths["num_tokens"].to_pylist() == [len(ids) for ids in whole["input_ids"].to_pylist()]
    assert lengths["num_supervised"].to_pylist() == [sum(mask) for mask in whole["loss_mask"].to_pylist()]
    request.start_row = 33
    assert table(await service.stream("ReadRendering", request)).equals(lengths.slice(33))
    part = data_service_pb2.ReadRenderingRequest(name=rendering.name, split=dataset_pb2.SPLIT_VALIDATION)
    assert set(table(await service.stream("ReadRendering", part))["split"].to_pylist()) == {"VALIDATION"}


async def test_preview_pages_through_rows_that_teach_nothing(service: Any) -> None:
    records = [chat(f"q{number}", "a", weight=number % 2) for number in range(8)]
    async with service.worker():
        version = await service.version(lines(*records))
        rendering = await service.rendering(version.name)
    assert [record.line for record in rendering.unsupervised_records] == [1, 3, 5, 7]
    request = data_service_pb2.PreviewRenderingRequest(
        name=rendering.name, unsupervised_only=True, page_size=3
    )
    first = await service.call("PreviewRendering", request)
    request.page_token = first.next_page_token
    second = await service.call("PreviewRendering", request)
    assert [row.row for row in [*first.rows, *second.rows]] == [0, 2, 4, 6]
    assert second.next_page_token == ""
    assert not any(token.supervised for row in first.rows for token in row.tokens)


async def test_a_bad_record_fails_a_strict_version_and_is_left_out_of_a_skipping_one(service: Any) -> None:
    data = lines(chat("q", "a"), {"messages": [{"role": "assistant", "content": "a"}]}) + b"{broken\n"
    async with service.worker():
        strict = await service.version(data)
        skipping = await service.version(data, invalid_record_policy=dataset_pb2.INVALID_RECORD_POLICY_SKIP)
    assert strict.state == dataset_pb2.DatasetVersion.STATE_FAILED
    error = status_to_failure(strict.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.INVALID_RECORDS)
    assert error.message == (
        "2 of 3 records are not valid, the first at 0.jsonl:2: messages[0].role: "
        "assistant must follow user, got it first"
    )
    assert strict.statistics.num_invalid == 2
    listed = await service.call(
        "ListDatasetVersionErrors",
        data_service_pb2.ListDatasetVersionErrorsRequest(parent=strict.name, page_size=1),
    )
    assert [(found.line, found.path, found.reason) for found in listed.errors] == [
        (2, "messages[0].role", "WRONG_ROLE_ORDER")
    ]
    rest = await service.call(
        "ListDatasetVersionErrors",
        data_service_pb2.ListDatasetVersionErrorsRequest(
            parent=strict.name, page_size=1, page_token=listed.next_page_token
        ),
    )
    assert [(found.line, found.reason) for found in rest.errors] == [(3, "INVALID_JSON")]
    assert rest.errors[0].value == "'{broken'" or "{broken" in rest.errors[0].value
    assert skipping.state == dataset_pb2.DatasetVersion.STATE_READY
    assert (skipping.statistics.num_records, skipping.statistics.num_invalid) == (1, 2)
    with pytest.raises(FailedPrecondition, match="must be READY, it is FAILED") as caught:
        await service.call("ListRecords", request_of(strict.name, 1))
    assert caught.value.reason == Reason.WRONG_STATE


BAD_FILES: list[tuple[bytes, str, str]] = [
    (b"", Reason.EMPTY_FILE, "0.jsonl must hold at least one record, it is empty"),
    (
        b'{"question": "q", "reply": "r"}\n',
        Reason.UNKNOWN_FORMAT,
        "0.jsonl: no known format has the keys found (question, reply); known are OPENAI_CHAT: messages; "
        "PROMPT_COMPLETION: completion, prompt; ALPACA: instruction, output",
    ),
    (
        b'{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n',
        Reason.INVALID_RECORDS,
        "1 of 2 records are not valid, the first at 0.jsonl:1: completion: must be there; "
        "the record has ['prompt']",
    ),
]


async def test_a_bad_file_fails_its_version_with_reason_and_message(service: Any) -> None:
    async with service.worker():
        for data, reason, message in BAD_FILES:
            version = await service.version(data)
            error = status_to_failure(version.error)
            assert version.state == dataset_pb2.DatasetVersion.STATE_FAILED
            assert (error.code, error.reason, error.message) == ("INVALID_ARGUMENT", reason, message)


BAD_RENDERINGS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"max_tokens": 6, "length_policy": rendering_pb2.LENGTH_POLICY_FAIL},
        Reason.SEQUENCE_TOO_LONG,
        "0.jsonl:1: must have at most 6 tokens, got ",
    ),
    (
        {"chat_template": "{% for m in messages %}{{ messages|length }}{{ m.content }}{% endfor %}"},
        Reason.TEMPLATE_NOT_PREFIX_PRESERVING,
        "0.jsonl:1: the chat template is not prefix-preserving: at message 1",
    ),
    (
        {"chat_template": "{% for m in messages %}"},
        Reason.TEMPLATE_INVALID,
        "the chat template does not compile",
    ),
    (
        {"chat_template": "{{ messages[0].__class__.__mro__ }}"},
        Reason.TEMPLATE_INVALID,
        "0.jsonl:1: the chat template fails: access to attribute '__class__'",
    ),
    (
        {"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
        Reason.TEMPLATE_INVALID,
        "rendering takes more than 2 s for 64 records at 0.jsonl:1",
    ),
    (
        {"chat_template": "{{ 'x' * 9999999999 }}"},
        Reason.TEMPLATE_INVALID,
        "rendering takes more than 512 MiB of memory at 0.jsonl:1",
    ),
]


async def test_a_bad_rendering_fails_with_reason_and_message(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("the question", "the answer")))
        for fields, reason, message in BAD_RENDERINGS:
            rendering = await service.rendering(version.name, **fields)
            error = status_to_failure(rendering.error)
            assert rendering.state == rendering_pb2.Rendering.STATE_FAILED
            assert (error.code, error.reason) == ("INVALID_ARGUMENT", reason)
            assert error.message.startswith(message), error.message
    with pytest.raises(FailedPrecondition, match="must be READY, it is FAILED"):
        await service.call("PreviewRendering", data_service_pb2.PreviewRenderingRequest(name=rendering.name))


async def test_a_rendering_with_another_tokenizer_than_promised_fails(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
        rendering = await service.rendering(version.name, f"{PROJECT}/models/other-tokenizer")
    error = status_to_failure(rendering.error)
    assert (error.code, error.reason) == ("DATA_LOSS", Reason.CHECKSUM_MISMATCH)
    assert f"must have digest {'0' * 64}" in error.message


REFUSED_RENDERINGS: list[tuple[dict[str, Any], type[LuthierError], str, str]] = [
    ({"model": ""}, InvalidArgument, Reason.FIELD_REQUIRED, "rendering.model: must be a resource name"),
    (
        {"model": "projects/second/models/base"},
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "rendering.model: must be in projects/default, got 'projects/second/models/base'",
    ),
    (
        {"dataset_version": "projects/second/datasets/a/versions/b"},
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "rendering.dataset_version: must be in projects/default, got",
    ),
    (
        {"model": f"{PROJECT}/models/nothing"},
        NotFound,
        Reason.BASE_MODEL_MISSING,
        f"rendering.model: {PROJECT}/models/nothing does not exist",
    ),
    (
        {"model": f"{PROJECT}/models/adapter"},
        InvalidArgument,
        Reason.INVALID_FIELD,
        f"its base model is {PROJECT}/models/base",
    ),
    (
        {"model": f"{PROJECT}/models/registering"},
        FailedPrecondition,
        Reason.WRONG_STATE,
        "must be READY, it is REGISTERING",
    ),
    (
        {"model": f"{PROJECT}/models/silent"},
        InvalidArgument,
        Reason.INVALID_FIELD,
        "rendering.max_tokens: must be set because",
    ),
    (
        {"max_tokens": 513},
        InvalidArgument,
        Reason.INVALID_FIELD,
        f"rendering.max_tokens: must be in 1..512, the context length of {PROJECT}/models/base, got 513",
    ),
    ({"max_tokens": -1}, InvalidArgument, Reason.INVALID_FIELD, "rendering.max_tokens: must be 0"),
    ({"mask_mode": 99}, InvalidArgument, Reason.INVALID_FIELD, "rendering.mask_mode: must be one of"),
    (
        {"dataset_version": f"{PROJECT}/datasets/news/versions/none"},
        NotFound,
        Reason.RESOURCE_NOT_FOUND,
        f"{PROJECT}/datasets/news/versions/none does not exist",
    ),
]


async def test_create_rendering_refuses_what_is_not_valid_and_leaves_nothing_behind(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    for fields, kind, reason, message in REFUSED_RENDERINGS:
        wanted = {"dataset_version": version.name, "model": f"{PROJECT}/models/base", **fields}
        request = data_service_pb2.CreateRenderingRequest(
            parent=PROJECT, rendering=rendering_pb2.Rendering(**wanted)
        )
        with pytest.raises(kind) as caught:
            await service.call("CreateRendering", request)
        assert caught.value.reason == reason, message
        assert message in caught.value.message
    listed = await service.call("ListRenderings", data_service_pb2.ListRenderingsRequest(parent=PROJECT))
    assert list(listed.renderings) == []


async def test_create_rendering_while_models_are_away_says_so(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    await service.models_stack.aclose()
    request = data_service_pb2.CreateRenderingRequest(
        parent=PROJECT,
        rendering=rendering_pb2.Rendering(dataset_version=version.name, model=f"{PROJECT}/models/base"),
    )
    with pytest.raises(Unavailable, match="cannot be reached; call again"):
        await service.call("CreateRendering", request)


async def test_a_version_from_another_projects_upload_is_refused(service: Any) -> None:
    await service.call(
        "CreateDataset",
        data_service_pb2.CreateDatasetRequest(
            parent=PROJECT, dataset_id="news", dataset=dataset_pb2.Dataset()
        ),
    )
    upload = await service.uploaded(b"x", parent="projects/second")
    wanted = dataset_pb2.DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload)])
    with pytest.raises(InvalidArgument) as caught:
        await service.call(
            "CreateDatasetVersion",
            data_service_pb2.CreateDatasetVersionRequest(
                parent=f"{PROJECT}/datasets/news", dataset_version=wanted
            ),
        )
    assert caught.value.reason == Reason.CROSS_PROJECT_REFERENCE
    assert caught.value.message == (
        f"dataset_version.sources[0].upload: must be in projects/default, got {upload!r}"
    )


async def test_no_call_without_a_key_and_none_of_a_task_beyond_its_resources(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    get = data_service_pb2.GetDatasetVersionRequest(name=version.name)
    with pytest.raises(Unauthenticated) as caught:
        await service.call("GetDatasetVersion", get, key="wrong")
    assert caught.value.reason == Reason.CREDENTIALS_INVALID

    def token(resource: str) -> str:
        minted: str = service.task_tokens.mint("default", (resource,), 1, "t", 60)
        return minted

    assert (await service.call("GetDatasetVersion", get, key=token(version.name))).name == version.name
    read = data_service_pb2.ReadRecordsRequest(name=version.name)
    assert table(await service.stream("ReadRecords", read, key=token(version.name))).num_rows == 1
    with pytest.raises(PermissionDenied):
        await service.stream("ReadRecords", read, key=token(f"{version.name}x"))
    with pytest.raises(PermissionDenied):
        await service.call("ListRecords", request_of(version.name, 1), key=token(version.name))
    with pytest.raises(PermissionDenied):
        await service.call(
            "GetDataset", data_service_pb2.GetDatasetRequest(name="projects/unknown/datasets/news")
        )


async def test_watch_tells_the_life_of_a_version(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    request = data_service_pb2.WatchDatasetVersionRequest(name=version.name)
    events = await service.stream("WatchDatasetVersion", request)
    states = [event.state_change.state for event in events if event.HasField("state_change")]
    assert states == ["QUEUED", "BUILDING", "READY"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    request.start_sequence = len(events)
    assert await service.stream("WatchDatasetVersion", request) == events[-1:]
    request.start_sequence = len(events) + 2
    with pytest.raises(OutOfRange):
        await service.stream("WatchDatasetVersion", request)


async def test_everything_is_there_after_a_restart(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
        rendering = await service.rendering(version.name)
    await service.stop()
    await service.start()
    request = data_service_pb2.GetRenderingRequest(name=rendering.name)
    assert await service.call("GetRendering", request) == rendering
    read = data_service_pb2.ReadRenderingRequest(name=rendering.name)
    assert table(await service.stream("ReadRendering", read)).num_rows == 1
