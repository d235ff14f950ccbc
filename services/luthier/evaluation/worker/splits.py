"""Records of a dataset version's split: its ids tell which are chosen, and only those are read, with neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from luthier.errors import FailedPrecondition
from luthier.evaluation.worker.questions import Question, choose
from luthier.evaluation.worker.wanted import spec_of
from luthier.text.records import PairRecord, record_from_json
from luthier.text.rendering import RenderingError
from luthier.text.units import reference_record, rejected_record
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


class Pinned(NamedTuple):
    """A dataset version by its name, and the digest that it has."""

    name: str
    digest: str


class _Split(NamedTuple):
    """A split of a version, and the task that it is read for."""

    context: TaskContext
    split: dataset_pb2.Split.ValueType
    version: Pinned


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
        self,
        context: TaskContext,
        split: dataset_pb2.Split.ValueType,
        count: int,
        seed: int,
        *,
        right_only: bool = False,
        version: Pinned | None = None,
    ) -> list[Question]:
        """Return `count` records of a split (0: all) in row order, chosen by the seed.

        They are of the evaluation's version, or of another one. With `right_only` chosen records whose answer is
        labelled undesirable are left out. Memory: what is chosen, and one chunk of the stream. Few records are read
        without the text of the others.

        Raises:
            DataLoss: the version's name means another one by now.
            FailedPrecondition: the answer of a chosen record is labelled undesirable. Of a pair the chosen answer is
                right.
            LuthierError: the Data service refused, or stayed away.
        """
        evaluation = spec_of(context.task).evaluation
        pinned = version or Pinned(evaluation.dataset_version, evaluation.dataset_digest)
        asked_split = _Split(context, split, pinned)
        if 0 < count <= _FEW:
            ids = (_Id(row=row, record_id=record_id) for row, record_id in self._ids(asked_split))
            stored = self._at(asked_split, [one.row for one in choose(ids, count, seed)])
        else:
            stored = choose(self._stored(asked_split), count, seed)
        # The name may have gone over to another version while the last stream opened.
        self._require_pinned(asked_split)
        return _questions(stored, right_only=right_only)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _ids(self, asked_split: _Split) -> Iterator[tuple[int, str]]:
        check = asked_split.context.check
        for batch in read_batches(lambda row: self._open(asked_split, row, ids_only=True), check):
            yield from zip(*(batch.column(name).to_pylist() for name in _COLUMNS[:2]), strict=True)

    def _stored(self, asked_split: _Split) -> Iterator[_Stored]:
        for batch in read_batches(lambda row: self._open(asked_split, row), asked_split.context.check):
            yield from _rows_of(batch)

    def _at(self, asked_split: _Split, rows: Sequence[int]) -> list[_Stored]:
        """Return the records of these rows, which rise; each chunk that is read gives all that it holds of them."""
        found: list[_Stored] = []
        while len(found) < len(rows):
            asked_split.context.check()
            chunk = self._chunk(asked_split, rows[len(found)])
            wanted = set(rows[len(found) :])
            found += (one for one in chunk if one.row in wanted)
        return found

    def _chunk(self, asked_split: _Split, row: int) -> list[_Stored]:
        """Return the first chunk from a row on."""
        calls: list[Messages[arrow_pb2.ArrowChunk]] = []

        def open_at(start_row: int) -> Messages[arrow_pb2.ArrowChunk]:
            call: Messages[arrow_pb2.ArrowChunk] = self._open(asked_split, start_row)
            calls.append(call)
            return call

        try:
            return list(_rows_of(next(read_batches(open_at, asked_split.context.check, row))))
        finally:
            for call in calls:
                call.cancel()

    def _open(self, asked_split: _Split, start_row: int, *, ids_only: bool = False) -> Any:
        """Open the stream at a row, of the version that was pinned: each time, for streams break and versions go."""
        self._require_pinned(asked_split)
        request = data_service_pb2.ReadRecordsRequest(
            name=asked_split.version.name, split=asked_split.split, start_row=start_row, ids_only=ids_only
        )
        return self._data.ReadRecords(
            request, metadata=bearer(asked_split.context.token), timeout=_READ_SECONDS
        )

    def _require_pinned(self, asked_split: _Split) -> None:
        name, digest = asked_split.version
        request = data_service_pb2.GetDatasetVersionRequest(name=name)
        version: dataset_pb2.DatasetVersion = asked(
            lambda: self._data.GetDatasetVersion.future(
                request, metadata=bearer(asked_split.context.token), timeout=_CALL_SECONDS
            ),
            asked_split.context.check,
        )
        require_pinned(name, digest, version.digest)


def _questions(stored: Sequence[_Stored], *, right_only: bool) -> list[Question]:
    questions: list[Question] = []
    refused: list[tuple[_Stored, RenderingError]] = []
    for one in stored:
        try:
            stored_record = record_from_json(one.text)
            record = reference_record(stored_record)
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
            rejected=rejected_record(stored_record) if isinstance(stored_record, PairRecord) else None,
        )
        questions.append(question)
    if refused and not right_only:
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
