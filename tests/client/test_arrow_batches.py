"""Reading tables over breaks."""

import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pyarrow as pa
import pytest
from tests.client.conftest import UID

from luthier.client import AsyncClient, Client
from luthier.errors import DataLoss, FailedPrecondition
from luthier.v1.arrow_pb2 import ArrowChunk
from luthier.v1.dataset_pb2 import SPLIT_TRAIN

ROWS = [0, 2, 3, 7, 8, 9]  # what the train split leaves of ten rows


def _chunk(rows: list[int]) -> ArrowChunk:
    batch = pa.record_batch({"row": pa.array(rows, pa.int64())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return ArrowChunk(ipc=sink.getvalue().to_pybytes(), first_row=rows[0], num_rows=len(rows))


def _breaking(services: Any, method: str) -> list[int]:
    starts: list[int] = []

    def read(request: Any, context: grpc.ServicerContext) -> Iterator[ArrowChunk]:
        assert request.uid == UID, "every request says whose rows it goes on with"
        starts.append(request.start_row)
        left = [row for row in ROWS if row >= request.start_row]
        for number, first in enumerate(range(0, len(left), 2)):
            if number == 1 and len(starts) < 3:
                services.refuse(context, grpc.StatusCode.UNAVAILABLE, "away", reason="SHUTTING_DOWN")
            yield _chunk(left[first : first + 2])

    services.answers[method] = read
    return starts


async def test_read_yields_each_row_once_over_breaks(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    starts = _breaking(services, "ReadRecords")
    table = pa.Table.from_batches(client.datasets.versions.read("d/v", split=SPLIT_TRAIN))
    assert table["row"].to_pylist() == ROWS
    assert starts == [0, 3, 8]
    starts = _breaking(services, "ReadRendering")
    batches = [batch async for batch in async_client.renderings.read("r", start_row=2)]
    assert pa.Table.from_batches(batches)["row"].to_pylist() == ROWS[1:]
    assert starts[0] == 2


def test_read_takes_up_what_another_process_saw(services: Any, client: Client) -> None:
    asked: list[Any] = []

    def read(request: Any, context: grpc.ServicerContext) -> Iterator[ArrowChunk]:
        asked.append(request)
        return iter([])

    services.answers["ReadRendering"] = read
    assert list(client.renderings.read("r", start_row=4, uid="of before")) == []
    assert [(request.start_row, request.uid) for request in asked] == [(4, "of before")]
    assert services.calls["GetRendering"] == 0


def test_read_reports_rows_that_come_twice(services: Any, client: Client) -> None:
    services.answers["ReadRecords"] = lambda request, context: iter([_chunk([0, 1]), _chunk([1, 2])])
    with pytest.raises(DataLoss, match="rows from 2 on"):
        list(client.datasets.versions.read("d/v"))


def test_read_without_pyarrow_says_what_to_install(
    services: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(FailedPrecondition, match=r"luthier-client\[arrow\]"):
        next(client.datasets.versions.read("d/v"))
    assert services.calls["ReadRecords"] == 0
