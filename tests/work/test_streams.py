"""Reading from other services through breaks: no row twice, no row missed, refusals told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pyarrow
import pytest

from luthier.errors import Cancelled, FailedPrecondition, Reason, ResourceExhausted, Unavailable
from luthier.errors.tree import BY_CODE
from luthier.runtime.status import to_trailer
from luthier.v1 import arrow_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.peers import Backoff, error_of
from luthier.work.retry import retrying

FINAL = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNIMPLEMENTED",
    "DATA_LOSS",
}


class Broken(grpc.RpcError):
    """What a channel raises."""

    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self._code = code
        self.trailer: tuple[Any, ...] = ()

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "told"

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self.trailer


class Opened:
    """Messages of a call, as a channel gives them."""

    def __init__(self, messages: Iterator[arrow_pb2.ArrowChunk]) -> None:
        self._messages = messages
        self.cancelled = False

    def __iter__(self) -> Iterator[arrow_pb2.ArrowChunk]:
        return self._messages

    def cancel(self) -> None:
        self.cancelled = True


def chunk(rows: list[int]) -> arrow_pb2.ArrowChunk:
    batch = pyarrow.record_batch({"row": rows})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return arrow_pb2.ArrowChunk(ipc=sink.getvalue().to_pybytes(), num_rows=len(rows))


def rows_of(batches: Iterator[Any]) -> list[int]:
    return [row for batch in batches for row in batch.column("row").to_pylist()]


def test_a_break_is_resumed_at_the_next_row() -> None:
    """The rows are those of one split: their numbers have gaps."""
    wanted = [0, 2, 3, 7, 8, 9]
    opened: list[int] = []

    def open_at(start: int) -> Iterator[arrow_pb2.ArrowChunk]:
        opened.append(start)
        left = [row for row in wanted if row >= start]
        yield chunk(left[:2])
        if len(opened) < 3:
            raise Broken(grpc.StatusCode.UNAVAILABLE)
        yield chunk(left[2:])

    assert rows_of(read_batches(lambda start: Opened(open_at(start)))) == wanted
    assert opened == [0, 3, 8]


def test_a_refusal_in_the_middle_is_told() -> None:
    def open_at(start: int) -> Iterator[arrow_pb2.ArrowChunk]:
        yield chunk([start])
        raise Broken(grpc.StatusCode.FAILED_PRECONDITION)

    with pytest.raises(FailedPrecondition, match="told"):
        rows_of(read_batches(lambda start: Opened(open_at(start))))


def test_an_empty_stream_has_no_rows() -> None:
    assert rows_of(read_batches(lambda start: Opened(iter(())))) == []


def test_who_reads_a_table_that_does_not_come_hears_within_a_second() -> None:
    """Neither the service nor the runner ends: only the wish to stop does."""
    silent = threading.Event()
    opened: list[Opened] = []
    stop_at = time.monotonic() + 0.5

    def chunks() -> Iterator[arrow_pb2.ArrowChunk]:
        yield chunk([0])
        silent.wait(20)

    def open_at(start: int) -> Opened:
        opened.append(Opened(chunks()))
        return opened[-1]

    def check() -> None:
        if time.monotonic() > stop_at:
            raise Cancelled("nobody wants it")

    with pytest.raises(Cancelled):
        rows_of(read_batches(open_at, check))
    assert time.monotonic() - stop_at < 1.0
    assert [one.cancelled for one in opened] == [True]
    silent.set()


def test_a_table_that_nobody_reads_on_is_given_up() -> None:
    sent: list[int] = []

    def chunks() -> Iterator[arrow_pb2.ArrowChunk]:
        for row in range(1000):
            sent.append(row)
            yield chunk([row])

    opened = Opened(chunks())
    batches = read_batches(lambda start: opened)
    next(batches)
    del batches
    assert opened.cancelled
    time.sleep(0.2)
    assert len(sent) <= 6, "only a few are read ahead"


def test_retrying_outlasts_a_short_absence() -> None:
    answers = [Broken(grpc.StatusCode.UNAVAILABLE), Broken(grpc.StatusCode.DEADLINE_EXCEEDED)]

    def call() -> str:
        if answers:
            raise answers.pop()
        return "here"

    assert retrying(call, patience_seconds=5) == "here"


def test_retrying_gives_up_in_time() -> None:
    def call() -> str:
        raise Broken(grpc.StatusCode.UNAVAILABLE)

    with pytest.raises(Unavailable, match="told"):
        retrying(call, patience_seconds=0.1)


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"])
def test_retrying_repeats_whatever_is_not_final(code: str) -> None:
    answers = [Broken(grpc.StatusCode[code])]

    def call() -> str:
        if answers:
            raise answers.pop()
        return "here"

    assert retrying(call, patience_seconds=5) == "here"


def test_a_service_that_says_when_to_ask_again_is_asked_then() -> None:
    error = Broken(grpc.StatusCode.RESOURCE_EXHAUSTED)
    refused = ResourceExhausted("full", retry_after_seconds=1.5)
    error.trailer = (to_trailer(refused),)
    told = error_of(error)
    assert told.retry_after_seconds == 1.5
    backoff = Backoff(0.001, 0.01)
    assert backoff.after(told) == 1.5
    told.retry_after_seconds = 1e9
    assert backoff.after(told) <= 60.0


@pytest.mark.parametrize("code", sorted(FINAL))
def test_retrying_passes_a_refusal_on_at_once(code: str) -> None:
    calls = []

    def call() -> str:
        calls.append(1)
        raise Broken(grpc.StatusCode[code])

    # A refused credential is this process's own: whoever asked it for something is told that it is away.
    ours = code in {"PERMISSION_DENIED", "UNAUTHENTICATED"}
    with pytest.raises(Unavailable if ours else BY_CODE[code]) as caught:
        retrying(call)
    assert len(calls) == 1
    assert (caught.value.reason == Reason.PEER_REFUSED) == ours
