"""One user's slow templates and another user's work, on one worker."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.data.test_cancel import SLOW, at_work

from luthier.errors import ResourceExhausted
from luthier.v1 import data_service_pb2, dataset_pb2, model_pb2, rendering_pb2

SLOW_USER, USER = "projects/default", "projects/second"
CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
READY = rendering_pb2.Rendering.STATE_READY
RENDERING = rendering_pb2.Rendering.STATE_RENDERING
QUEUED = rendering_pb2.Rendering.STATE_QUEUED


async def version(service: Any, project: str) -> dataset_pb2.DatasetVersion:
    """A version of one record, READY."""
    create = data_service_pb2.CreateDatasetRequest(parent=project, dataset_id="chats")
    await service.call("CreateDataset", create)
    upload = await service.uploaded(CHAT.encode(), parent=project)
    wanted = dataset_pb2.DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload)])
    request = data_service_pb2.CreateDatasetVersionRequest(
        parent=f"{project}/datasets/chats", dataset_version=wanted
    )
    made = await service.call("CreateDatasetVersion", request)
    get = data_service_pb2.GetDatasetVersionRequest(name=made.name)
    await at_work(service, "GetDatasetVersion", get, dataset_pb2.DatasetVersion.STATE_READY)
    return made  # type: ignore[no-any-return]


async def begun(
    service: Any, project: str, of: str, template: str = ""
) -> data_service_pb2.GetRenderingRequest:
    """A rendering that nobody waits for; returns the request that reads it."""
    wanted = rendering_pb2.Rendering(
        dataset_version=of, model=f"{project}/models/base", chat_template=template
    )
    request = data_service_pb2.CreateRenderingRequest(parent=project, rendering=wanted)
    made = await service.call("CreateRendering", request)
    return data_service_pb2.GetRenderingRequest(name=made.name)


async def cancel(service: Any, name: str) -> None:
    """Ask a rendering to stop, again where a busy machine's service says so."""
    async with asyncio.timeout(60):
        while True:
            try:
                await service.call("CancelRendering", data_service_pb2.CancelRenderingRequest(name=name))
            except ResourceExhausted:
                await asyncio.sleep(0.2)
            else:
                return


async def test_slow_renderings_of_one_user_hold_up_neither_versions_nor_renderings_of_another(
    service: Any,
) -> None:
    """Templates that never end, as many as there are slots for one project and one more."""
    service.limits = type(service.limits)(cpu_seconds=600, memory_bytes=512 << 20)
    theirs = model_pb2.Model()
    theirs.CopyFrom(service.models.models[f"{SLOW_USER}/models/base"])
    theirs.name = f"{USER}/models/base"
    service.models.models[theirs.name] = theirs
    async with service.worker():
        chats = await version(service, SLOW_USER)
        slow = [await begun(service, SLOW_USER, chats.name, SLOW) for _ in range(3)]
        for one in slow[:2]:
            await at_work(service, "GetRendering", one, RENDERING)
        other = await version(service, USER)
        read = await begun(service, USER, other.name)
        await at_work(service, "GetRendering", read, READY)
        states = [(await service.call("GetRendering", one)).state for one in slow]
        assert states == [RENDERING, RENDERING, QUEUED]
        # A version of the slow user's own is held up by no rendering either.
        more = dataset_pb2.DatasetVersion(
            sources=[dataset_pb2.DatasetSource(upload=await service.uploaded(CHAT.encode()))]
        )
        request = data_service_pb2.CreateDatasetVersionRequest(
            parent=f"{SLOW_USER}/datasets/chats", dataset_version=more
        )
        made = await service.call("CreateDatasetVersion", request)
        get = data_service_pb2.GetDatasetVersionRequest(name=made.name)
        await at_work(service, "GetDatasetVersion", get, dataset_pb2.DatasetVersion.STATE_READY)
        for one in slow:
            await cancel(service, one.name)
        for one in slow:
            await at_work(service, "GetRendering", one, rendering_pb2.Rendering.STATE_CANCELLED)
