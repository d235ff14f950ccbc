"""Page tokens of what a dataset, a version and a rendering have: none leads to another one that has the name by now."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.made_records import chat, lines
from tests.data.renderings.test_refusals import REFUSING
from tests.data.renderings.test_servicer import PROJECT

from luthier.errors import InvalidArgument, Reason
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2

RECORDS = lines(
    *(chat(question, "a") for question in ("q1", "bad 2", "bad 3", "q4")),
    {"messages": []},
    {"messages": []},
)
SKIPPING: dict[str, Any] = {"invalid_record_policy": dataset_pb2.INVALID_RECORD_POLICY_SKIP}
REFUSED: dict[str, Any] = {
    "chat_template": REFUSING,
    "template_error_policy": rendering_pb2.TEMPLATE_ERROR_POLICY_SKIP,
}


async def tokens_of(service: Any, *requests: Any) -> None:
    """Ask each for the second page from now on."""
    for request in requests:
        request.page_size = 1
        answer = await service.call(rpc_of(request), request)
        request.page_token = answer.next_page_token
        assert request.page_token, f"{rpc_of(request)} has one page only"
        await service.call(rpc_of(request), request)


async def refused(service: Any, *requests: Any) -> None:
    for request in requests:
        with pytest.raises(InvalidArgument) as caught:
            await service.call(rpc_of(request), request)
        assert caught.value.reason == Reason.PAGE_TOKEN_INVALID, request
        request.page_token = ""
        await tokens_of(service, request)


def rpc_of(request: Any) -> str:
    return str(request.DESCRIPTOR.name).removesuffix("Request")


async def version_again(service: Any, name: str) -> None:
    """Build a version of the same records under the name of a deleted one."""
    parent, _, last = name.partition("/versions/")
    upload = await service.uploaded(RECORDS, "0.jsonl")
    wanted = dataset_pb2.DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload)], **SKIPPING)
    request = data_service_pb2.CreateDatasetVersionRequest(
        parent=parent, dataset_version_id=last, dataset_version=wanted
    )
    await service.call("CreateDatasetVersion", request)
    await service.stream("WatchDatasetVersion", data_service_pb2.WatchDatasetVersionRequest(name=name))


async def rendering_again(service: Any, former: rendering_pb2.Rendering) -> None:
    """Render the same version under the name of a deleted rendering."""
    wanted = rendering_pb2.Rendering(dataset_version=former.dataset_version, model=former.model, **REFUSED)
    request = data_service_pb2.CreateRenderingRequest(
        parent=PROJECT, rendering_id=former.name.rpartition("/")[2], rendering=wanted
    )
    await service.call("CreateRendering", request)
    await service.stream("WatchRendering", data_service_pb2.WatchRenderingRequest(name=former.name))


async def test_a_token_of_what_is_deleted_is_refused_for_the_new_one_of_its_name(service: Any) -> None:
    async with service.worker():
        version = await service.version(RECORDS, **SKIPPING)
        rendering = await service.rendering(version.name, **REFUSED)
        of_rendering = (
            data_service_pb2.ListRenderingErrorsRequest(parent=rendering.name),
            data_service_pb2.PreviewRenderingRequest(name=rendering.name),
        )
        await tokens_of(service, *of_rendering)
        await service.call("DeleteRendering", data_service_pb2.DeleteRenderingRequest(name=rendering.name))
        await rendering_again(service, rendering)
        await refused(service, *of_rendering)
        of_version = (
            data_service_pb2.ListDatasetVersionErrorsRequest(parent=version.name),
            data_service_pb2.ListRecordsRequest(parent=version.name),
        )
        await tokens_of(service, *of_version)
        await delete_version(service, version.name)
        await version_again(service, version.name)
        await refused(service, *of_version)


async def delete_version(service: Any, name: str) -> None:
    await service.call("DeleteDatasetVersion", data_service_pb2.DeleteDatasetVersionRequest(name=name))


async def test_a_token_of_a_deleted_dataset_is_refused_for_the_new_one_of_its_name(service: Any) -> None:
    request = data_service_pb2.ListDatasetVersionsRequest(parent=f"{PROJECT}/datasets/news")
    async with service.worker():
        versions = [await service.version(RECORDS, **SKIPPING) for _ in range(2)]
        await tokens_of(service, request)
        for version in versions:
            await delete_version(service, version.name)
        await service.call("DeleteDataset", data_service_pb2.DeleteDatasetRequest(name=request.parent))
        for _ in range(2):
            await service.version(RECORDS, **SKIPPING)
        await refused(service, request)
