"""The whole Data service over real ports, with a real worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.data.made_records import chat, lines, table

from luthier.errors import (
    InvalidArgument,
    OutOfRange,
    PermissionDenied,
    Reason,
    Unauthenticated,
)
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2

if TYPE_CHECKING:
    pass

PROJECT = "projects/default"


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
        await service.call(
            "ListRecords", data_service_pb2.ListRecordsRequest(parent=version.name), key=token(version.name)
        )
    with pytest.raises(PermissionDenied):
        await service.call(
            "GetDataset", data_service_pb2.GetDatasetRequest(name="projects/unknown/datasets/news")
        )


async def test_a_request_id_is_answered_once_and_refused_with_another_body(service: Any) -> None:
    request = data_service_pb2.CreateDatasetRequest(
        parent=PROJECT,
        dataset=dataset_pb2.Dataset(display_name="one"),
        request_id="7d3b2d4e-8f3a-4d52-9f3c-0d9a3f1b2c4d",
    )
    first = await service.call("CreateDataset", request)
    request.dataset.display_name = "two"
    with pytest.raises(InvalidArgument) as caught:
        await service.call("CreateDataset", request)
    assert caught.value.reason == Reason.REQUEST_ID_REUSED
    listed = await service.call("ListDatasets", data_service_pb2.ListDatasetsRequest(parent=PROJECT))
    assert list(listed.datasets) == [first]


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
