"""Tables in Arrow: needs pyarrow, which the extra `luthier-client[arrow]` brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from luthier.client.flows import Q, ResumedStream, Scope, StreamFlow, StreamPick
from luthier.errors import DataLoss, FailedPrecondition
from luthier.v1.arrow_pb2 import ArrowChunk

if TYPE_CHECKING:
    import pyarrow


async def read_batches(
    scope: Scope, pick: StreamPick[Q, ArrowChunk], request_from: Callable[[int], Q], start_row: int
) -> StreamFlow[pyarrow.RecordBatch]:
    """Yield the record batches from `start_row` on, each row once over any number of breaks.

    `request_from` builds the request for the rows from a number on.

    Raises:
        FailedPrecondition: pyarrow is not installed.
        DataLoss: The service sends rows again that it has sent.
    """
    ipc = _arrow_ipc()
    next_row = start_row
    stream = ResumedStream(scope, pick, lambda: request_from(next_row))
    try:
        while (chunk := (await stream.receive())) is not None:
            if chunk.first_row < next_row:
                raise DataLoss(f"expected rows from {next_row} on, got rows from {chunk.first_row} on")
            for batch in _decode(ipc, chunk):
                yield batch
                # Rows of other splits are left out, so the next row is not the first plus the count.
                next_row = batch.column("row")[-1].as_py() + 1 if batch.num_rows else next_row
    finally:
        stream.close()


def _decode(ipc: Any, chunk: ArrowChunk) -> Iterator[pyarrow.RecordBatch]:
    with ipc.open_stream(chunk.ipc) as reader:
        yield from reader


def _arrow_ipc() -> Any:
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise FailedPrecondition(
            "reading tables needs pyarrow: pip install 'luthier-client[arrow]'"
        ) from error
    return pyarrow.ipc
