"""Records of a dataset version's split, read as a stream of which only what is chosen is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.evaluation.worker.questions import Question, choose
from luthier.text.records import record_from_json
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc, dataset_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.context import TaskContext
from luthier.work.peers import bearer, channel
from luthier.work.retry import Messages

_READ_SECONDS = 600.0
_COLUMNS = ("row", "record_id", "filename", "line", "record")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    row: int
    record_id: str
    filename: str
    line: int
    text: str


class Splits:
    """Splits of dataset versions at the Data service.

    Args:
        data_address: host:port of the Data service.
    """

    def __init__(self, data_address: str) -> None:
        self._channel = channel(data_address)
        self._data = data_service_pb2_grpc.DataServiceStub(self._channel)

    def read(
        self, context: TaskContext, split: dataset_pb2.Split.ValueType, count: int, seed: int
    ) -> list[Question]:
        """Return `count` records of a split (0: all) in row order, chosen by the seed.

        Memory: what is chosen, and one chunk of the stream.

        Raises:
            LuthierError: the Data service refused, or stayed away.
        """
        return [
            Question(
                row=one.row,
                record_id=one.record_id,
                record=record_from_json(one.text),
                filename=one.filename,
                line=one.line,
            )
            for one in choose(self._stored(context, split), count, seed)
        ]

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _stored(self, context: TaskContext, split: dataset_pb2.Split.ValueType) -> Iterator[_Stored]:
        name = context.task.evaluate.evaluation.dataset_version

        def open_at(row: int) -> Messages[arrow_pb2.ArrowChunk]:
            request = data_service_pb2.ReadRecordsRequest(name=name, split=split, start_row=row)
            chunks: Messages[arrow_pb2.ArrowChunk] = self._data.ReadRecords(
                request, metadata=bearer(context.token), timeout=_READ_SECONDS
            )
            return chunks

        for batch in read_batches(open_at, context.check):
            columns = [batch.column(column).to_pylist() for column in _COLUMNS]
            for row, record_id, filename, line, text in zip(*columns, strict=True):
                yield _Stored(row=row, record_id=record_id, filename=filename, line=line, text=text)
