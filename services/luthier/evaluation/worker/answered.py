"""What the arms of an evaluation have answered so far, kept at the service so that no attempt asks it again."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import proto
from google.protobuf.message import DecodeError

from luthier.errors import DataLoss
from luthier.evaluation import shares
from luthier.evaluation.worker.wanted import spec_of
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

COMMIT_SECONDS = 10.0
"""Answers are kept when a batch ends and this long has passed since the last were: about what a lost attempt loses."""


class Answered:
    """The batches that were answered, by this attempt or one before; new ones are committed now and then.

    Args:
        context: the task.
        commit_seconds: time between commits at least.
    """

    def __init__(self, context: TaskContext, commit_seconds: float = COMMIT_SECONDS) -> None:
        self._context = context
        self._commit_seconds = commit_seconds
        self._batches: dict[tuple[str, int], task_pb2.AnsweredBatch] = {}
        self._pending: list[task_pb2.AnsweredBatch] = []
        self._committed_at = time.monotonic()
        self._num_records = 0
        self._num_answers = 0
        for file in spec_of(context.task).checkpoint_files:
            for batch in _read(context.fetch(file)):
                self._keep(batch)

    @property
    def num_records(self) -> int:
        """Answers so far, of all arms together."""
        return self._num_answers

    def missing(self, arm_id: str, rows: range) -> list[int]:
        """Return the first rows of the batches of an arm that were not answered, of those that some rows are."""
        firsts = range(rows.start, rows.stop, shares.ROWS_A_BATCH)
        return [first for first in firsts if (arm_id, first) not in self._batches]

    def add(self, batch: task_pb2.AnsweredBatch) -> None:
        """Keep a batch, and commit what is not committed when it is time.

        Raises:
            LuthierError: the service refused.
        """
        self._keep(batch)
        self._pending.append(batch)
        if time.monotonic() - self._committed_at >= self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit what is not committed.

        Raises:
            LuthierError: the service refused.
        """
        if not self._pending:
            return
        path = self._context.scratch / f"answers-{self._num_records}"
        buffer = io.BytesIO()
        for batch in self._pending:
            proto.serialize_length_prefixed(batch, buffer)
        path.write_bytes(buffer.getbuffer())
        stored = self._context.store(path, path.name)
        self._context.commit_checkpoint(self._num_records, [stored], {})
        path.unlink()
        self._pending.clear()
        self._committed_at = time.monotonic()

    def of(self, arm_id: str) -> list[task_pb2.AnsweredBatch]:
        """Return the batches of an arm in row order."""
        return [self._batches[key] for key in sorted(self._batches) if key[0] == arm_id]

    def _keep(self, batch: task_pb2.AnsweredBatch) -> None:
        self._batches[batch.arm_id, batch.first_row] = batch
        self._num_records += len(batch.records)
        # What was found of given tokens is a record without an answer.
        self._num_answers += sum(bool(one.finish_reason) or one.HasField("error") for one in batch.records)


def _read(path: Path) -> Iterator[task_pb2.AnsweredBatch]:
    data = io.BytesIO(path.read_bytes())
    try:
        while (batch := proto.parse_length_prefixed(task_pb2.AnsweredBatch, data)) is not None:
            yield batch
    except (DecodeError, ValueError) as error:
        raise DataLoss(f"the answers {path.name} of an earlier attempt cannot be read: {error}") from error
