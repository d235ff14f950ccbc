"""What many who watch one resource cost the service."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from luthier.runtime import calls
from luthier.v1 import data_service_pb2, dataset_pb2
from luthier.v1.event_pb2 import Event

PARENT = "projects/default/datasets/watched"
NUM_WATCHERS = 60


async def test_an_event_is_made_bytes_once_however_many_watch(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when it is stored: no stream makes them again."""
    made: list[Any] = []
    sent: list[bytes] = []
    whole = calls._Serializer.__call__

    def counting(self: Any, response: Any) -> bytes:
        made.extend([response] if isinstance(response, Event) else [])
        sent.extend([response] if isinstance(response, bytes) else [])
        return whole(self, response)

    monkeypatch.setattr(calls._Serializer, "__call__", counting)
    dataset = data_service_pb2.CreateDatasetRequest(parent="projects/default", dataset_id="watched")
    await service.call("CreateDataset", dataset)
    source = dataset_pb2.DatasetSource(upload=await service.uploaded(b'{"prompt": "q", "completion": "a"}\n'))
    version = dataset_pb2.DatasetVersion(sources=[source])
    create = data_service_pb2.CreateDatasetVersionRequest(parent=PARENT, dataset_version=version)
    name = (await service.call("CreateDatasetVersion", create)).name
    watch = data_service_pb2.WatchDatasetVersionRequest(name=name)
    watching = [
        asyncio.create_task(service.stream("WatchDatasetVersion", watch)) for _ in range(NUM_WATCHERS)
    ]
    async with asyncio.timeout(20):
        while len(sent) + len(made) < NUM_WATCHERS:  # noqa: ASYNC110 - each gets the first event
            await asyncio.sleep(0.02)
    await service.call("CancelDatasetVersion", data_service_pb2.CancelDatasetVersionRequest(name=name))
    seen = await asyncio.gather(*watching)
    states = ["QUEUED", "CANCELLING", "CANCELLED"]
    assert [[event.state_change.state for event in one] for one in seen] == [states] * NUM_WATCHERS
    assert made == []
    assert len(sent) == NUM_WATCHERS * len(states)
    assert len({id(wire) for wire in sent}) == len(states), (
        "all who stand at the same place get the same bytes"
    )
