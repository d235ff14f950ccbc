"""Where the rows of a rendering come from: files and lines, for what went wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from luthier.errors import FailedPrecondition, LuthierError
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc
from luthier.work.arrow_stream import read_batches
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.retry import Messages, Token

_NAMED = 3
_CALL_SECONDS = 30.0

Places = Callable[[Sequence[tuple[str, int]]], list[str]]


def places_of(channel: grpc.Channel, token: Token, check: Check) -> Places:
    """Return what tells the places of rows, `file:line` each, as far as the Data service can be asked.

    A row is its rendering's name and its number there.
    """
    stub: Any = data_service_pb2_grpc.DataServiceStub(channel)

    def place(rendering: str, row: int) -> str:
        calls: list[Messages[arrow_pb2.ArrowChunk]] = []

        def open_at(start_row: int) -> Messages[arrow_pb2.ArrowChunk]:
            request = data_service_pb2.ReadRenderingRequest(name=rendering, start_row=start_row)
            call: Messages[arrow_pb2.ArrowChunk] = stub.ReadRendering(
                request, metadata=bearer(token()), timeout=_CALL_SECONDS
            )
            calls.append(call)
            return call

        try:
            batch = next(read_batches(open_at, check, row))
            return f"{batch.column('filename')[0].as_py()}:{batch.column('line')[0].as_py()}"
        finally:
            for call in calls:
                call.cancel()

    return lambda rows: [place(rendering, row) for rendering, row in rows]


@contextmanager
def rows_named(places: Places, rendering: str) -> Iterator[None]:
    """Let a failure that names rows name the places of the first of them too.

    They are rows of `rendering`, unless the failure says of which each is. It stays what it is when the Data service
    cannot say where they are from.
    """
    try:
        yield
    except FailedPrecondition as error:
        rows = [int(row) for row in error.metadata.get("rows", "").split(",") if row]
        if not rows:
            raise
        said = error.metadata.get("renderings", "")
        renderings = said.split(",") if said else [rendering] * len(rows)
        try:
            named = places(list(zip(renderings, rows, strict=True))[:_NAMED])
        except LuthierError:
            raise error from None
        raise FailedPrecondition(
            f"{error.message}; the first of them are {', '.join(named)}",
            reason=error.reason,
            metadata={**error.metadata, "places": ",".join(named)},
        ) from error
