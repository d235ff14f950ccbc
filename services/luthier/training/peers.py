"""What the Training service asks of the Data service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import grpc
import pyarrow

from luthier.errors import DataLoss, Reason, Unavailable
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.training.jobs.planning import Lengths, RenderingView, SplitCounts, UnsupervisedRecord
from luthier.training.recipes.batches import RowLength
from luthier.training.teaching import Taught
from luthier.v1 import data_service_pb2, data_service_pb2_grpc, dataset_pb2, rendering_pb2
from luthier.work.convert import status_to_failure
from luthier.work.peers import bearer, error_of, is_passing

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

    async def get(self, name: str) -> RenderingView:
        """Return a rendering. Raises NotFound, and Unavailable when the service is away."""
        request = data_service_pb2.GetRenderingRequest(name=name)
        return view_of(await self._called(lambda: self._get(request)))

    async def lengths(self, name: str) -> Lengths:
        """Return the row lengths of a READY rendering. Raises as `get`, and FailedPrecondition."""
        request = data_service_pb2.ReadRenderingRequest(
            name=name, view=data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
        )
        return await self._called(lambda: self._read(request))

    async def _get(self, request: data_service_pb2.GetRenderingRequest) -> rendering_pb2.Rendering:
        response: rendering_pb2.Rendering = await self._stub.GetRendering(
            request, metadata=self._credential(request.name), timeout=_CALL_SECONDS
        )
        return response

    async def _read(self, request: data_service_pb2.ReadRenderingRequest) -> Lengths:
        rows: dict[str, list[RowLength]] = {"TRAIN": [], "VALIDATION": []}
        stream = self._stub.ReadRendering(
            request, metadata=self._credential(request.name), timeout=_STREAM_SECONDS
        )
        async for chunk in stream:
            for split, row in lengths_of(chunk.ipc):
                rows.get(split, []).append(row)
        return Lengths(train=tuple(rows["TRAIN"]), validation=tuple(rows["VALIDATION"]))

    def _credential(self, name: str) -> tuple[tuple[str, str], ...]:
        return bearer(self._tokens.mint(project_of(name), (name,), 0, "plan", _TOKEN_SECONDS))

    async def _called(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if is_passing(error):
                raise Unavailable(
                    f"the Data service at {self._address} must answer to check the rendering, it is away: "
                    f"{error.details()}",
                    reason=Reason.SERVICE_UNAVAILABLE,
                    retry_after_seconds=2.0,
                ) from error
            raise error_of(error) from error


def view_of(message: rendering_pb2.Rendering) -> RenderingView:
    """Read what a job needs to know of a rendering."""
    train = [entry for entry in message.split_statistics if entry.split == dataset_pb2.SPLIT_TRAIN]
    counts = [
        SplitCounts(
            num_dropped=entry.num_dropped,
            num_truncated=entry.num_truncated,
            num_unsupervised=entry.num_unsupervised,
        )
        for entry in train
    ]
    failed = message.HasField("error")
    return RenderingView(
        name=message.name,
        state=rendering_pb2.Rendering.State.Name(message.state).removeprefix("STATE_"),
        digest=message.digest,
        tokenizer_digest=message.tokenizer_digest,
        failure_message=status_to_failure(message.error).message if failed else "",
        train=counts[0] if counts else SplitCounts(),
        unsupervised_records=tuple(
            UnsupervisedRecord(filename=record.filename, line=record.line, message=record.message)
            for record in message.unsupervised_records
        ),
        warnings=tuple(message.warnings),
        taught=Taught(
            # A rendering made before it kept what rendered it says at least what it was given.
            chat_template=message.effective_chat_template or message.chat_template,
            template_date=message.template_date,
            prefix_token_ids=tuple(message.prefix_token_ids),
            stop_token_ids=tuple(message.stop_token_ids),
            tokenizer_digest=message.tokenizer_digest,
            rendering=message.name,
            rendering_digest=message.digest,
        ),
    )


def lengths_of(ipc: bytes) -> Iterator[tuple[str, RowLength]]:
    """Yield split and length of each row of a chunk of the lengths view.

    Raises:
        DataLoss: the chunk has other columns.
    """
    table = pyarrow.ipc.open_stream(ipc).read_all()
    wanted = ("row", "split", "num_tokens", "num_supervised")
    if not set(wanted) <= set(table.column_names):
        raise DataLoss(f"a chunk of lengths must have the columns {wanted}, got {table.column_names}")
    columns: Mapping[str, list[Any]] = {name: table.column(name).to_pylist() for name in wanted}
    for row, split, num_tokens, num_supervised in zip(*(columns[name] for name in wanted), strict=True):
        yield split, RowLength(row=row, num_tokens=num_tokens, num_supervised=num_supervised)
