"""Read the rows of a rendering from the Data service, and keep them as they were planned with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow

from luthier.training.worker.order import RenderingRows
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc, rendering_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.pinned import require_pinned
from luthier.work.retry import Messages, Token, asked
from luthier.work.row_file import write_rows

_CALL_SECONDS = 30.0
_STREAM_SECONDS = 3600.0


def store_rows(
    channel: grpc.Channel,
    token: Token,
    name: str,
    digest: str,
    check: Check,
    path: Path,
    tell: Callable[[int], None] = lambda _: None,
) -> RenderingRows:
    """Read all rows of a rendering into a file. Memory: one batch of them.

    Args:
        channel: to the Data service.
        token: gives a fresh credential.
        name: the rendering.
        digest: what the job was planned with.
        check: called several times a second, whatever the service does; may raise to stop.
        path: the file to write.
        tell: called with how many more have come, whenever some have.

    Raises:
        DataLoss: the rendering has another digest.
        LuthierError: the service refused, or was away for too long (Unavailable).
    """
    stub: Any = data_service_pb2_grpc.DataServiceStub(channel)

    def planned_with() -> rendering_pb2.Rendering:
        request = data_service_pb2.GetRenderingRequest(name=name)
        rendering: rendering_pb2.Rendering = asked(
            lambda: stub.GetRendering.future(request, metadata=bearer(token()), timeout=_CALL_SECONDS), check
        )
        require_pinned(name, digest, rendering.digest)
        return rendering

    def open_at(row: int) -> Messages[arrow_pb2.ArrowChunk]:
        planned_with()  # each time, for streams break and renderings go
        wanted = data_service_pb2.ReadRenderingRequest(name=name, start_row=row)
        chunks: Messages[arrow_pb2.ArrowChunk] = stub.ReadRendering(
            wanted, metadata=bearer(token()), timeout=_STREAM_SECONDS
        )
        return chunks

    write_rows(path, _streams(read_batches(open_at, check), tell))
    return RenderingRows(path=path, rendering=planned_with())


def _streams(batches: Iterator[Any], tell: Callable[[int], None]) -> Iterator[bytes]:
    """Yield each batch as a stream of its own: one that is read again after a break need not be as the others."""
    for batch in batches:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        tell(batch.num_rows)
        yield sink.getvalue().to_pybytes()
