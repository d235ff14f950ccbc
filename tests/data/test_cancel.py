"""Versions and renderings that are asked to stop: queued, at work, over."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

import pytest

from luthier.errors import Aborted, FailedPrecondition, NotFound, Reason
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2

PROJECT = "projects/default"
MODEL = f"{PROJECT}/models/base"
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"


def lines(number: int) -> bytes:
    return b"".join(
        json.dumps({"prompt": f"question {index}", "completion": "answer"}).encode() + b"\n"
        for index in range(number)
    )


async def begun_version(service: Any, data: bytes) -> dataset_pb2.DatasetVersion:
    """A dataset with a version that nobody waits for."""
    dataset = data_service_pb2.CreateDatasetRequest(parent=PROJECT, dataset_id="big")
    await service.call("CreateDataset", dataset)
    upload = await service.uploaded(data)
    wanted = dataset_pb2.DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload)])
    request = data_service_pb2.CreateDatasetVersionRequest(
        parent=f"{PROJECT}/datasets/big", dataset_version=wanted
    )
    return await service.call("CreateDatasetVersion", request)  # type: ignore[no-any-return]


async def begun_rendering(service: Any) -> rendering_pb2.Rendering:
    """A rendering whose template never ends a record."""
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    version = await service.version(json.dumps(chat).encode(), dataset="chats")
    wanted = rendering_pb2.Rendering(dataset_version=version.name, model=MODEL, chat_template=SLOW)
    request = data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=wanted)
    return await service.call("CreateRendering", request)  # type: ignore[no-any-return]


async def at_work(service: Any, method: str, request: Any, state: int) -> None:
    async with asyncio.timeout(20):
        while (await service.call(method, request)).state != state:  # noqa: ASYNC110 - a worker brings it about
            await asyncio.sleep(0.02)


async def states(service: Any, method: str, request: Any) -> list[str]:
    events = await service.stream(method, request)
    return [event.state_change.state for event in events if event.WhichOneof("payload") == "state_change"]


async def test_cancel_of_a_queued_version_ends_it_and_repeats_without_harm(service: Any) -> None:
    made = await begun_version(service, lines(3))
    cancel = data_service_pb2.CancelDatasetVersionRequest(name=made.name, etag='"7"')
    with pytest.raises(Aborted) as caught:
        await service.call("CancelDatasetVersion", cancel)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    cancel.etag = made.etag
    cancel.request_id = str(uuid.uuid4())
    cancelled = await service.call("CancelDatasetVersion", cancel)
    assert cancelled.state == dataset_pb2.DatasetVersion.STATE_CANCELLED
    assert not cancelled.HasField("error")
    assert await service.call("CancelDatasetVersion", cancel) == cancelled
    again = data_service_pb2.CancelDatasetVersionRequest(name=made.name)
    assert await service.call("CancelDatasetVersion", again) == cancelled
    watch = data_service_pb2.WatchDatasetVersionRequest(name=made.name)
    assert await states(service, "WatchDatasetVersion", watch) == ["QUEUED", "CANCELLING", "CANCELLED"]
    with pytest.raises(FailedPrecondition, match="must be READY, it is CANCELLED"):
        await service.call("ListRecords", data_service_pb2.ListRecordsRequest(parent=made.name))


async def test_cancel_of_a_version_that_is_built_stops_it_within_seconds(service: Any) -> None:
    made = await begun_version(service, lines(300_000))
    get = data_service_pb2.GetDatasetVersionRequest(name=made.name)
    async with service.worker():
        await at_work(service, "GetDatasetVersion", get, dataset_pb2.DatasetVersion.STATE_BUILDING)
        began = time.monotonic()
        asked = await service.call(
            "CancelDatasetVersion", data_service_pb2.CancelDatasetVersionRequest(name=made.name)
        )
        assert asked.state == dataset_pb2.DatasetVersion.STATE_CANCELLING
        await at_work(service, "GetDatasetVersion", get, dataset_pb2.DatasetVersion.STATE_CANCELLED)
        assert time.monotonic() - began < 3.0
        # The worker is free for the next one.
        assert (await service.version(lines(3))).state == dataset_pb2.DatasetVersion.STATE_READY
    assert (
        await service.call(
            "CancelDatasetVersion", data_service_pb2.CancelDatasetVersionRequest(name=made.name)
        )
    ).state == dataset_pb2.DatasetVersion.STATE_CANCELLED


async def test_cancel_of_a_rendering_whose_model_cannot_be_fetched_is_heard_within_a_second(
    service: Any,
) -> None:
    async with service.worker():
        version = await service.version(lines(3))
    wanted = rendering_pb2.Rendering(dataset_version=version.name, model=MODEL)
    request = data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=wanted)
    made = await service.call("CreateRendering", request)
    await service.models_stack.aclose()
    get = data_service_pb2.GetRenderingRequest(name=made.name)
    async with service.worker():
        await at_work(service, "GetRendering", get, rendering_pb2.Rendering.STATE_RENDERING)
        await asyncio.sleep(2)  # the pauses between two tries are longer than a second by now
        began = time.monotonic()
        await service.call("CancelRendering", data_service_pb2.CancelRenderingRequest(name=made.name))
        await at_work(service, "GetRendering", get, rendering_pb2.Rendering.STATE_CANCELLED)
        assert time.monotonic() - began < 2.0, "a heartbeat brings the wish, the wait hears it"


async def test_cancel_of_a_ready_version_changes_nothing(service: Any) -> None:
    async with service.worker():
        ready = await service.version(lines(3))
    cancel = data_service_pb2.CancelDatasetVersionRequest(name=ready.name)
    assert await service.call("CancelDatasetVersion", cancel) == ready
    cancel.name = f"{ready.name}-none"
    with pytest.raises(NotFound):
        await service.call("CancelDatasetVersion", cancel)


async def test_cancel_of_a_rendering_ends_even_a_template_without_end(service: Any) -> None:
    service.limits = type(service.limits)(cpu_seconds=60, memory_bytes=512 << 20)
    async with service.worker():
        made = await begun_rendering(service)
        get = data_service_pb2.GetRenderingRequest(name=made.name)
        await at_work(service, "GetRendering", get, rendering_pb2.Rendering.STATE_RENDERING)
        await asyncio.sleep(2)  # until the child has begun with the record
        began = time.monotonic()
        cancel = data_service_pb2.CancelRenderingRequest(name=made.name)
        asked = await service.call("CancelRendering", cancel)
        assert asked.state == rendering_pb2.Rendering.STATE_CANCELLING
        await at_work(service, "GetRendering", get, rendering_pb2.Rendering.STATE_CANCELLED)
        assert time.monotonic() - began < 3.0
    assert (await service.call("CancelRendering", cancel)).state == rendering_pb2.Rendering.STATE_CANCELLED
    watch = data_service_pb2.WatchRenderingRequest(name=made.name)
    assert await states(service, "WatchRendering", watch) == [
        "QUEUED",
        "RENDERING",
        "CANCELLING",
        "CANCELLED",
    ]


async def test_cancel_of_a_queued_rendering_takes_the_etag(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(3))
    wanted = rendering_pb2.Rendering(dataset_version=version.name, model=MODEL)
    request = data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=wanted)
    made = await service.call("CreateRendering", request)
    cancel = data_service_pb2.CancelRenderingRequest(name=made.name, etag='"9"')
    with pytest.raises(Aborted) as caught:
        await service.call("CancelRendering", cancel)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    cancel.etag = made.etag
    cancelled = await service.call("CancelRendering", cancel)
    assert cancelled.state == rendering_pb2.Rendering.STATE_CANCELLED
    cancel.etag = ""
    assert await service.call("CancelRendering", cancel) == cancelled
