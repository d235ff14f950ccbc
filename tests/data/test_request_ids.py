"""Many calls with one request id, at once: one resource, and one answer for all."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from luthier.errors import InvalidArgument, Reason, ResourceExhausted
from luthier.v1 import data_service_pb2, dataset_pb2

PROJECT = "projects/default"


async def test_two_hundred_calls_with_one_request_id_make_one_dataset(service: Any) -> None:
    """Each call would choose an id of its own for it."""
    request = data_service_pb2.CreateDatasetRequest(parent=PROJECT, request_id=str(uuid.uuid4()))

    async def create() -> dataset_pb2.Dataset:
        async with asyncio.timeout(60):
            while True:
                try:
                    return await service.call("CreateDataset", request)  # type: ignore[no-any-return]
                except ResourceExhausted as error:
                    refused = error
                # Too many at once: call again when the service says.
                assert refused.retry_after_seconds
                await asyncio.sleep(refused.retry_after_seconds)

    answers = await asyncio.gather(*(create() for _ in range(200)))
    assert all(answer == answers[0] for answer in answers)
    listed = await service.call("ListDatasets", data_service_pb2.ListDatasetsRequest(parent=PROJECT))
    assert [dataset.name for dataset in listed.datasets] == [answers[0].name]
    request.dataset.display_name = "another"
    with pytest.raises(InvalidArgument) as caught:
        await service.call("CreateDataset", request)
    assert caught.value.reason == Reason.REQUEST_ID_REUSED
