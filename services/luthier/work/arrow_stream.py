"""Read a table that a service streams as ArrowChunk messages, going on after a break where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow

from luthier.v1 import arrow_pb2
from luthier.work.limited import Check
from luthier.work.retry import Messages, streamed

Open = Callable[[int], Messages[arrow_pb2.ArrowChunk]]


def read_batches(open_at: Open, check: Check = lambda: None, first_row: int = 0) -> Iterator[Any]:
    """Yield the record batches of a stream whose rows carry their number in a column `row`.

    Args:
        open_at: opens the stream at a row number; called again with the next row wanted after a break.
        check: called before every chunk and while there is none; what it raises ends the reading.
        first_row: the first row wanted.

    Raises:
        LuthierError: the service refused, or stayed away.
    """
    next_row = first_row

    def begin() -> Messages[arrow_pb2.ArrowChunk]:
        return open_at(next_row)

    for chunk in streamed(begin, check):
        for batch in pyarrow.ipc.open_stream(chunk.ipc):
            yield batch
            next_row = batch.column("row")[-1].as_py() + 1 if batch.num_rows else next_row
