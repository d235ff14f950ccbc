"""Datasets, versions and records over a real port, by a real worker."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from tests.data.made_records import chat, lines, table

from luthier.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reason,
    ResourceExhausted,
)
from luthier.errors.status import status_to_failure
from luthier.v1 import chat_pb2, data_service_pb2, dataset_pb2

if TYPE_CHECKING:
    pass

PROJECT = "projects/default"


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
    request.start_row = 1
    request.uid = version.uid
    assert table(await service.stream("ReadRecords", request)).equals(whole.slice(1))
    request.uid = "another"
    with pytest.raises(NotFound, match=f"{version.name} must have uid another") as caught:
        await service.stream("ReadRecords", request)
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    request.uid = ""
    request.start_row = 1501
    assert await service.stream("ReadRecords", request) == []
    request.start_row = 1502
    with pytest.raises(OutOfRange, match=r"start_row must be in 0\.\.1501, got 1502"):
        await service.stream("ReadRecords", request)


async def test_a_bad_record_fails_a_strict_version_and_is_left_out_of_a_skipping_one(service: Any) -> None:
    data = lines(chat("q", "a"), {"messages": [{"role": "user", "content": "q"}]}) + b"{broken\n"
    async with service.worker():
        strict = await service.version(data)
        skipping = await service.version(data, invalid_record_policy=dataset_pb2.INVALID_RECORD_POLICY_SKIP)
    assert strict.state == dataset_pb2.DatasetVersion.STATE_FAILED
    error = status_to_failure(strict.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.INVALID_RECORDS)
    assert error.message == (
        "2 of 3 records are not valid, the first at 0.jsonl:2: messages[0].role: "
        "the last turn must be assistant, got user: what follows the last answer teaches nothing"
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
        "PROMPT_COMPLETION: completion, prompt; ALPACA: instruction, output; SHAREGPT: conversations; "
        "PREFERENCE_OPENAI: input, non_preferred_output, preferred_output; PREFERENCE: chosen, rejected; "
        "SHAREGPT_PREFERENCE: chosen, rejected, conversations or messages; UNPAIRED: completion, label, prompt; "
        "SHAREGPT_UNPAIRED: label, conversations or messages; QUESTION_ANSWER: answer, question",
    ),
    (
        b'{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n',
        Reason.INVALID_RECORDS,
        "1 of 2 records are not valid, the first at 0.jsonl:1: completion: must be there; "
        "the record has prompt",
    ),
]


async def test_a_bad_file_fails_its_version_with_reason_and_message(service: Any) -> None:
    async with service.worker():
        for data, reason, message in BAD_FILES:
            version = await service.version(data)
            error = status_to_failure(version.error)
            assert version.state == dataset_pb2.DatasetVersion.STATE_FAILED
            assert (error.code, error.reason, error.message) == ("INVALID_ARGUMENT", reason, message)


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


async def test_lists_filter_order_and_page(service: Any) -> None:
    for number in range(3):
        await service.call(
            "CreateDataset",
            data_service_pb2.CreateDatasetRequest(
                parent=PROJECT,
                dataset_id=f"d{number}",
                dataset=dataset_pb2.Dataset(labels={"parity": str(number % 2)}),
            ),
        )
    request = data_service_pb2.ListDatasetsRequest(parent=PROJECT, page_size=2, order_by="create_time")
    first = await service.call("ListDatasets", request)
    request.page_token = first.next_page_token
    second = await service.call("ListDatasets", request)
    assert [dataset.name[-2:] for dataset in [*first.datasets, *second.datasets]] == ["d0", "d1", "d2"]
    even = data_service_pb2.ListDatasetsRequest(parent=PROJECT, filter='labels.parity = "0"')
    found = await service.call("ListDatasets", even)
    assert [dataset.name[-2:] for dataset in found.datasets] == ["d2", "d0"]
    with pytest.raises(InvalidArgument) as caught:
        await service.call(
            "ListDatasets", data_service_pb2.ListDatasetsRequest(parent=PROJECT, filter="size > 3")
        )
    assert caught.value.reason == Reason.FILTER_INVALID


async def test_a_version_of_pairs_and_labels_shows_formats_records_and_warnings(service: Any) -> None:
    turn = {"role": "assistant", "content": "a"}
    pairs = ({"prompt": "q", "chosen": f"a{number}", "rejected": "b"} for number in range(200))
    asked = {"input": {"messages": chat("q", "a")["messages"][:1]}}
    async with service.worker():
        version = await service.version(
            lines(*pairs),
            lines({**asked, "preferred_output": [turn], "non_preferred_output": [turn]}),
            lines({"prompt": "q", "completion": "a", "label": False}),
            split_settings=dataset_pb2.SplitSettings(test_fraction=0.4, seed=3),
        )
    assert [source.detected_format for source in version.sources] == [
        dataset_pb2.DATASET_FORMAT_PREFERENCE,
        dataset_pb2.DATASET_FORMAT_PREFERENCE_OPENAI,
        dataset_pb2.DATASET_FORMAT_UNPAIRED,
    ]
    (warning,) = version.warnings
    assert "test_fraction asks for 40.0%: records that begin by asking the same stay together" in warning
    found = (await service.call("ListRecords", request_of(version.name, 1000))).records
    shapes = [record.WhichOneof("example") for record in found]
    assert shapes == [*["completion_pair"] * 200, "conversation_pair", "prompt_completion"]
    assert [record.label for record in found[-2:]] == [0, chat_pb2.LABEL_UNDESIRABLE]
    assert len({record.split for record in found if record.WhichOneof("example") != "conversation_pair"}) == 1


async def test_a_dozen_lists_at_once_all_answer_and_an_upload_goes_on_meanwhile(service: Any) -> None:
    async with service.worker():
        version = await service.version(
            lines(*({"prompt": f"q{number}", "completion": f"a{number}"} for number in range(6000)))
        )
    # Two cores have six; the calls must not need more than they hold.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))

    async def listed() -> Any:
        while True:
            try:
                return await service.call("ListRecords", request_of(version.name, 50))
            except ResourceExhausted as error:  # a busy machine has no slot for all of them at once
                if error.reason != Reason.OVERLOADED:
                    raise
                await asyncio.sleep(error.retry_after_seconds or 0.0)

    calls = [listed() for _ in range(12)]
    async with asyncio.timeout(30):
        pages, _ = await asyncio.gather(asyncio.gather(*calls), service.uploaded(b"x" * 3_000_000))
    assert {len(page.records) for page in pages} == {50}
