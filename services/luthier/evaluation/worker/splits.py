"""Records of a dataset version's split: its ids tell which are chosen, and only those are read, with neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import FailedPrecondition
from luthier.evaluation.worker.questions import Question, choose
from luthier.evaluation.worker.wanted import spec_of
from luthier.text.records import record_from_json
from luthier.text.rendering import RenderingError
from luthier.text.units import reference_record
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc, dataset_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.context import TaskContext
from luthier.work.peers import bearer, channel
from luthier.work.pinned import require_pinned
from luthier.work.retry import Messages, asked

_CALL_SECONDS = 30.0
_READ_SECONDS = 600.0
_FEW = 8
"""Records that are read one after the other by their rows; more are picked out of the whole stream."""
_COLUMNS = ("row", "record_id", "filename", "line", "record")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Id:
    row: int
    record_id: str


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

        Memory: what is chosen, and one chunk of the stream. Few records are read without the text of the others.

        Raises:
            DataLoss: the version's name means another one by now.
            FailedPrecondition: the answer of a chosen record is labelled undesirable. Of a pair the chosen answer is
                right.
            LuthierError: the Data service refused, or stayed away.
        """
        if 0 < count <= _FEW:
            ids = (_Id(row=row, record_id=record_id) for row, record_id in self._ids(context, split))
            stored = self._at(context, split, [one.row for one in choose(ids, count, seed)])
        else:
            stored = choose(self._stored(context, split), count, seed)
        self._require_pinned(
            context
        )  # the name may have gone over to another version while the last stream opened
        return _questions(stored)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _ids(self, context: TaskContext, split: dataset_pb2.Split.ValueType) -> Iterator[tuple[int, str]]:
        for batch in read_batches(lambda row: self._open(context, split, row, ids_only=True), context.check):
            yield from zip(*(batch.column(name).to_pylist() for name in _COLUMNS[:2]), strict=True)

    def _stored(self, context: TaskContext, split: dataset_pb2.Split.ValueType) -> Iterator[_Stored]:
        for batch in read_batches(lambda row: self._open(context, split, row), context.check):
            yield from _rows_of(batch)

    def _at(
        self, context: TaskContext, split: dataset_pb2.Split.ValueType, rows: Sequence[int]
    ) -> list[_Stored]:
        """Return the records of these rows, which rise; each chunk that is read gives all that it holds of them."""
        found: list[_Stored] = []
        while len(found) < len(rows):
            context.check()
            chunk = self._chunk(context, split, rows[len(found)])
            wanted = set(rows[len(found) :])
            found += (one for one in chunk if one.row in wanted)
        return found

    def _chunk(self, context: TaskContext, split: dataset_pb2.Split.ValueType, row: int) -> list[_Stored]:
        """Return the first chunk from a row on."""
        calls: list[Messages[arrow_pb2.ArrowChunk]] = []

        def open_at(start_row: int) -> Messages[arrow_pb2.ArrowChunk]:
            call: Messages[arrow_pb2.ArrowChunk] = self._open(context, split, start_row)
            calls.append(call)
            return call

        try:
            return list(_rows_of(next(read_batches(open_at, context.check, row))))
        finally:
            for call in calls:
                call.cancel()

    def _open(
        self,
        context: TaskContext,
        split: dataset_pb2.Split.ValueType,
        start_row: int,
        *,
        ids_only: bool = False,
    ) -> Any:
        """Open the stream at a row, of the version that was pinned: each time, for streams break and versions go."""
        self._require_pinned(context)
        name = spec_of(context.task).evaluation.dataset_version
        request = data_service_pb2.ReadRecordsRequest(
            name=name, split=split, start_row=start_row, ids_only=ids_only
        )
        return self._data.ReadRecords(request, metadata=bearer(context.token), timeout=_READ_SECONDS)

    def _require_pinned(self, context: TaskContext) -> None:
        evaluation = spec_of(context.task).evaluation
        request = data_service_pb2.GetDatasetVersionRequest(name=evaluation.dataset_version)
        version: dataset_pb2.DatasetVersion = asked(
            lambda: self._data.GetDatasetVersion.future(
                request, metadata=bearer(context.token), timeout=_CALL_SECONDS
            ),
            context.check,
        )
        require_pinned(evaluation.dataset_version, evaluation.dataset_digest, version.digest)


def _questions(stored: Sequence[_Stored]) -> list[Question]:
    questions: list[Question] = []
    refused: list[tuple[_Stored, RenderingError]] = []
    for one in stored:
        try:
            record = reference_record(record_from_json(one.text))
        except RenderingError as error:
            refused.append((one, error))
            continue
        question = Question(
            row=one.row,
            record_id=one.record_id,
            record=record,
            filename=one.filename,
            line=one.line,
            item_json=one.text,
        )
        questions.append(question)
    if refused:
        first, why = refused[0]
        raise FailedPrecondition(
            f"{len(refused)} of {len(stored)} records have nothing to compare an answer with, the first is "
            f"{first.filename}:{first.line}: {why}; evaluate on a version whose answers are right",
            reason=why.reason,
            metadata={"filename": first.filename, "line": str(first.line)},
        )
    return questions


def _rows_of(batch: Any) -> Iterator[_Stored]:
    columns = [batch.column(column).to_pylist() for column in _COLUMNS]
    for row, record_id, filename, line, text in zip(*columns, strict=True):
        yield _Stored(row=row, record_id=record_id, filename=filename, line=line, text=text)
