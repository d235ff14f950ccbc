"""Read a table that a service streams as ArrowChunk messages, going on after a break where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import grpc
import pyarrow

from luthier.v1 import arrow_pb2
from luthier.work.peers import is_final, peer_error_of
from luthier.work.retry import retrying

Open = Callable[[int], Iterable[arrow_pb2.ArrowChunk]]


def read_batches(open_at: Open, first_row: int = 0) -> Iterator[Any]:
    """Yield the record batches of a stream whose rows carry their number in a column `row`.

    Args:
        open_at: opens the stream at a row number; called again with the next row wanted after a break.
        first_row: the first row wanted.

    Raises:
        LuthierError: the service refused, or stayed away.
    """
    next_row = first_row
    while True:
        chunks = retrying(partial(_open_first, open_at, next_row))
        try:
            for batch in _batches(chunks):
                yield batch
                next_row = batch.column("row")[-1].as_py() + 1 if batch.num_rows else next_row
        except grpc.RpcError as error:
            if is_final(error):
                raise peer_error_of(error, "the Data service") from error
            continue
        return


def _batches(chunks: Iterable[arrow_pb2.ArrowChunk]) -> Iterator[Any]:
    for chunk in chunks:
        yield from pyarrow.ipc.open_stream(chunk.ipc)


def _open_first(open_at: Open, row: int) -> Iterable[arrow_pb2.ArrowChunk]:
    """Open the stream and wait for its first chunk, so that a refusal shows while it can be retried."""
    chunks = iter(open_at(row))
    first = next(chunks, None)
    if first is None:
        return ()
    return _chain(first, chunks)


def _chain(
    first: arrow_pb2.ArrowChunk, rest: Iterator[arrow_pb2.ArrowChunk]
) -> Iterator[arrow_pb2.ArrowChunk]:
    yield first
    yield from rest
