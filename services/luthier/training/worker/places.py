"""Where the rows of a rendering come from: files and lines, for what went wrong with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from luthier.errors import LuthierError, Unavailable
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc
from luthier.work.arrow_stream import read_batches
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.retry import Messages, Token

_NAMED = 3
_CALL_SECONDS = 30.0
_PATIENCE_SECONDS = 15.0
"""A failure waits no longer for a Data service that is away: the next attempt does."""

Places = Callable[[Sequence[tuple[str, int]]], list[str]]


def places_of(channel: grpc.Channel, token: Token, check: Check) -> Places:
    """Return what tells the places of rows, `file:line` each, as far as the Data service can be asked.

    A row is its rendering's name and its number there.
    """
    stub: Any = data_service_pb2_grpc.DataServiceStub(channel)

    def place(rendering: str, row: int) -> str:
        deadline = time.monotonic() + _PATIENCE_SECONDS

        def heed() -> None:
            check()
            if time.monotonic() > deadline:
                raise Unavailable(f"the places of rows did not come within {_PATIENCE_SECONDS:g} s")

        calls: list[Messages[arrow_pb2.ArrowChunk]] = []

        def open_at(start_row: int) -> Messages[arrow_pb2.ArrowChunk]:
            request = data_service_pb2.ReadRenderingRequest(name=rendering, start_row=start_row)
            call: Messages[arrow_pb2.ArrowChunk] = stub.ReadRendering(
                request, metadata=bearer(token()), timeout=_CALL_SECONDS
            )
            calls.append(call)
            return call

        try:
            batch = next(read_batches(open_at, heed, row))
            return f"{batch.column('filename')[0].as_py()}:{batch.column('line')[0].as_py()}"
        finally:
            for call in calls:
                call.cancel()

    return lambda rows: [place(rendering, row) for rendering, row in rows]


@contextmanager
def rows_named(places: Places, renderings: Sequence[str]) -> Iterator[None]:
    """Let a failure that names rows name the places of the first of them too.

    They are rows of the first of `renderings`, the job's, unless the failure says of which each is. It stays what it is
    when the Data service cannot say where they are from.
    """
    try:
        yield
    except LuthierError as error:
        rows = _rows(error.metadata, renderings)
        if not rows:
            raise
        try:
            named = _distinct(places, rows)
        except LuthierError:
            raise error from None
        words = f"the first of them are {', '.join(named)}" if len(rows) > 1 else f"it is {named[0]}"
        raise error.amended(words, {"places": ",".join(named)}) from error


def _rows(metadata: Mapping[str, str], renderings: Sequence[str]) -> list[tuple[str, int]]:
    """Return the rows that a failure names, in its order; none where it names their files itself."""
    listed = metadata.get("rows") or metadata.get("row", "")
    if not listed or "filename" in metadata:
        return []
    rows = [int(row) for row in listed.split(",")]
    said = metadata.get("renderings") or metadata.get("rendering", "")
    if not said and "rows" not in metadata and len(renderings) > 1:
        return []  # it does not say of which
    named = said.split(",") if said else [renderings[0]]
    if len(named) == 1:
        named *= len(rows)
    return list(zip(named, rows, strict=True))


def _distinct(places: Places, rows: Sequence[tuple[str, int]]) -> list[str]:
    """Return the places of the first rows, each once: the rows of a unit are from one."""
    found: dict[str, None] = {}
    for row in rows[: 2 * _NAMED]:
        found.update(dict.fromkeys(places([row])))
        if len(found) == _NAMED:
            break
    return list(found)
