"""What the Training service asks of the Data service."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import pyarrow
import pyarrow.compute

from luthier.errors import DataLoss, NotFound
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.training.jobs.planning import SplitLengths
from luthier.v1 import data_service_pb2, data_service_pb2_grpc, rendering_pb2
from luthier.work.peers import bearer, service_error_of

_CALL_SECONDS = 15.0
_STREAM_SECONDS = 120.0
_TOKEN_SECONDS = 300.0
T = TypeVar("T")


class DataRenderings:
    """Renderings of the Data service, read with a short-lived token for just the one asked for."""

    def __init__(self, channel: grpc.aio.Channel, tokens: TaskTokens, address: str) -> None:
        self._stub: Any = data_service_pb2_grpc.DataServiceStub(channel)
        self._tokens = tokens
        self._address = address

    async def get(self, name: str) -> rendering_pb2.Rendering:
        """Return a rendering. Raises NotFound, and Unavailable when the service is away."""
        request = data_service_pb2.GetRenderingRequest(name=name)
        return await self._called(lambda: self._get(request))

    async def lengths(self, name: str) -> SplitLengths:
        """Return the row lengths of a READY rendering. Raises as `get`, and FailedPrecondition."""
        request = data_service_pb2.ReadRenderingRequest(
            name=name, view=data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
        )
        return await self._called(lambda: self._read(request))

    async def place(self, name: str, row: int) -> str:
        """Return the file and the line of a row of a READY rendering, `file:line`. Raises as `lengths`."""
        return await self._called(
            lambda: self._place(data_service_pb2.ReadRenderingRequest(name=name, start_row=row))
        )

    async def _place(self, request: data_service_pb2.ReadRenderingRequest) -> str:
        stream = self._stub.ReadRendering(
            request, metadata=self._credential(request.name), timeout=_CALL_SECONDS
        )
        try:
            async for chunk in stream:
                table = pyarrow.ipc.open_stream(chunk.ipc).read_all()
                return f"{table.column('filename')[0].as_py()}:{table.column('line')[0].as_py()}"
        finally:
            stream.cancel()
        raise NotFound(f"{request.name} has no row {request.start_row}")

    async def _get(self, request: data_service_pb2.GetRenderingRequest) -> rendering_pb2.Rendering:
        response: rendering_pb2.Rendering = await self._stub.GetRendering(
            request, metadata=self._credential(request.name), timeout=_CALL_SECONDS
        )
        return response

    async def _read(self, request: data_service_pb2.ReadRenderingRequest) -> SplitLengths:
        lengths = SplitLengths()
        stream = self._stub.ReadRendering(
            request, metadata=self._credential(request.name), timeout=_STREAM_SECONDS
        )
        async for chunk in stream:
            add_lengths(chunk.ipc, lengths)
        return lengths

    def _credential(self, name: str) -> tuple[tuple[str, str], ...]:
        return bearer(self._tokens.mint(project_of(name), (name,), 0, "plan", _TOKEN_SECONDS))

    async def _called(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            raise service_error_of(error, f"the Data service at {self._address}") from error


def add_lengths(ipc: bytes, lengths: SplitLengths) -> None:
    """Add the rows of a chunk of the lengths view to those of their split, without a Python object a row.

    Raises:
        DataLoss: the chunk has other columns.
    """
    table = pyarrow.ipc.open_stream(ipc).read_all()
    wanted = ("row", "split", "num_tokens", "num_supervised")
    if not set(wanted) <= set(table.column_names):
        raise DataLoss(f"a chunk of lengths must have the columns {wanted}, got {table.column_names}")
    if "unit" not in table.column_names:  # a Data service of before units
        table = table.append_column("unit", table.column("row"))
    for split, packed in (("TRAIN", lengths.train), ("VALIDATION", lengths.validation)):
        rows = table.filter(pyarrow.compute.equal(table.column("split"), split))
        for name, column in (
            ("row", packed.rows),
            ("unit", packed.units),
            ("num_tokens", packed.num_tokens),
            ("num_supervised", packed.num_supervised),
        ):
            _extend(
                column, rows.column(name), pyarrow.int64() if name in ("row", "unit") else pyarrow.int32()
            )


def _extend(column: array[int], values: Any, type_: Any) -> None:
    for chunk in values.cast(type_).chunks:
        start, end = chunk.offset * column.itemsize, (chunk.offset + len(chunk)) * column.itemsize
        column.frombytes(memoryview(chunk.buffers()[1])[start:end])
