"""Tables in Arrow: needs pyarrow, which the extra `luthier-client[arrow]` brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.client.flows import Q, ResumedStream, Scope, StreamFlow, StreamPick, UnaryPick, call, replaced
from luthier.errors import DataLoss, FailedPrecondition
from luthier.v1.arrow_pb2 import ArrowChunk
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.rendering_pb2 import Rendering

if TYPE_CHECKING:
    import pyarrow
    from google.protobuf.message import Message

G = TypeVar("G", bound="Message")
HasRows = TypeVar("HasRows", DatasetVersion, Rendering)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Where to begin: at a row, of the resource of a uid (empty: of the one that has the name now)."""

    start_row: int = 0
    uid: str = ""


async def read_batches(
    scope: Scope,
    pick: StreamPick[Q, ArrowChunk],
    request: Q,
    reading: tuple[UnaryPick[G, HasRows], G],
    since: Row,
) -> StreamFlow[pyarrow.RecordBatch]:
    """Yield the record batches from a row on, each row once over any number of breaks.

    `request` is for all of them; `reading` says which resource has them.

    Raises:
        FailedPrecondition: pyarrow is not installed.
        DataLoss: The service sends rows again that it has sent.
        NotFound: RESOURCE_REPLACED; the name is another resource's now.
    """
    ipc = _arrow_ipc()
    next_row = since.start_row
    uid = since.uid or (await call(scope, *reading)).uid
    stream = ResumedStream(scope, pick, lambda: replaced(request, start_row=next_row, uid=uid))
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
