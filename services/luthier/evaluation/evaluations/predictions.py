"""The predictions of evaluations, however they are kept: one file, a file a share, or rows of the database."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from google.protobuf.message import DecodeError

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.evaluation.evaluations import repository, rules
from luthier.evaluation.evaluations.rules import State
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.work.lifecycle import Lifecycle
from luthier.work.row_file import RowFile, read_rows

StoredEvaluation = Stored[Evaluation, EvaluationPrivate]


def covered(parts: Sequence[PredictionFile]) -> list[range]:
    """Return the records that some files have predictions of, as ranges that do not touch, in order."""
    found: list[range] = []
    for rows in sorted(map(_rows, parts), key=lambda one: one.start):
        if found and rows.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, rows.stop))
        else:
            found.append(rows)
    return found


class PredictionReader:
    """Reads predictions a page at a time."""

    def __init__(self, database: Database, blobs: BlobStore, lifecycle: Lifecycle) -> None:
        self._database = database
        self._blobs = blobs
        self._lifecycle = lifecycle
        self._table = repository.Predictions()

    async def read(
        self, evaluation: StoredEvaluation, first: int, limit: int, limit_bytes: int
    ) -> list[Prediction]:
        """Return predictions after the `first` ones: at most `limit`, and one at least of what `limit_bytes` hold.

        Raises:
            FailedPrecondition: it has not SUCCEEDED, nor ended otherwise after some of them.
            DataLoss: they are not what was stored.
        """
        message, private = evaluation.message, evaluation.private
        if private.HasField("predictions"):
            rows = await read_rows(self._blobs, _file(private.predictions), first, limit, limit_bytes)
            return [_prediction(row) for row in rows]
        if private.parts:
            return await self._joined(evaluation, first, limit, limit_bytes)
        if message.state != State.STATE_SUCCEEDED:
            state = self._lifecycle.name(message.state)
            raise FailedPrecondition(
                f"{message.name} must be SUCCEEDED to have predictions, it is {state}",
                reason=Reason.WRONG_STATE,
                metadata={"name": message.name, "state": state},
            )
        async with self._database.reading() as connection:
            rows = await self._table.read(connection, evaluation.uid, first, limit)
        total_bytes = accumulate(map(len, rows))
        fitting = max(1, sum(size <= limit_bytes for size in total_bytes))
        return [_prediction(row) for row in rows[:fitting]]

    async def _joined(
        self, evaluation: StoredEvaluation, first: int, limit: int, limit_bytes: int
    ) -> list[Prediction]:
        """Return what the shares answered, each record once with its answers in the order of the arms."""
        parts = evaluation.private.parts
        rows = _after(covered(parts), first)[:limit]
        said: dict[int, list[Prediction]] = {}
        for part in parts:
            own = _rows(part)
            wanted = range(max(rows.start, own.start), min(rows.stop, own.stop))
            if not wanted:
                continue
            found = await read_rows(
                self._blobs, _file(part), wanted.start - own.start, len(wanted), limit_bytes // len(parts)
            )
            for row, one in zip(wanted, found, strict=False):
                said.setdefault(row, []).append(_prediction(one))
            # What did not fit is of a later page, with what others say of it.
            rows = range(rows.start, min(rows.stop, wanted.start + len(found)))
        arms = {arm.arm_id: place for place, arm in enumerate(evaluation.message.arms)}
        return [_merged(said[row], arms) for row in rows]


def _after(ranges: Sequence[range], count: int) -> range:
    """Return the records of the range in which the one after the `count` first ones is, from that one on."""
    for rows in ranges:
        if count < len(rows):
            return rows[count:]
        count -= len(rows)
    return range(0)


def _merged(found: Sequence[Prediction], arms: dict[str, int]) -> Prediction:
    merged = Prediction()
    merged.CopyFrom(found[0])
    answers = sorted(
        (answer for one in found for answer in one.answers), key=lambda answer: arms[answer.arm_id]
    )
    del merged.answers[:]
    merged.answers.extend(answers)
    return merged


def _rows(part: PredictionFile) -> range:
    return range(part.first_row, part.first_row + part.num_rows)


def _file(kept: PredictionFile) -> RowFile:
    return RowFile(sha256=kept.sha256, size_bytes=kept.size_bytes, num_rows=kept.num_rows)


def _prediction(row: bytes) -> Prediction:
    try:
        return rules.judged(Prediction.FromString(row))
    except DecodeError as error:
        raise DataLoss(f"a stored prediction of {len(row)} bytes cannot be read: {error}") from error
