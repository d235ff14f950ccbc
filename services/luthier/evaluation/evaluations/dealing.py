"""Evaluations that are dealt to several workers: how their shares go on, and what becomes of the whole then.

A share that fails stops the others. Once none is left to be waited for, an evaluation whose shares are all answered is
closed by one more task, which finds every answer there and scores them; any other ends with what was answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, FieldViolation, InvalidArgument
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.evaluation.evaluations import repository, rules
from luthier.evaluation.evaluations.result_rules import SHARE_LIMITS
from luthier.evaluation.evaluations.rules import State
from luthier.evaluation.evaluations.service import EvaluationService
from luthier.evaluation.shares import all_rows, num_answers
from luthier.storage.blobs import BlobStore
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile, ShareRow
from luthier.v1 import event_pb2
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.row_file import found_rows
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

_AWAITED = (ShareRow.STATE_QUEUED, ShareRow.STATE_RUNNING)


class ShareHandler(FamilyTasks[Evaluation, EvaluationPrivate]):
    """Follows ANSWER_SHARE tasks."""

    result_limits = SHARE_LIMITS

    def __init__(self, evaluations: EvaluationService, blobs: BlobStore) -> None:
        states = TaskStates(
            queued=State.STATE_QUEUED, begun=State.STATE_RUNNING, cancelled=State.STATE_CANCELLED
        )
        super().__init__(evaluations.family, states)
        self._evaluations = evaluations
        self._blobs = blobs
        self._shares = repository.Shares()
        self._answers = repository.AnswerFiles()

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to answer, with the answers that earlier attempts kept."""
        evaluation = await self._evaluations.family.of_uid(connection, task.uid)
        row = _of(task, await self._shares.read(connection, task.uid))
        answers = await self._answers.read(connection, task.uid, task.share)
        spec = rules.spec(evaluation.message, evaluation.private, answers, row.share)
        return task_pb2.Task(answer_share=spec)

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began: the evaluation is RUNNING from the first one on."""
        row = _of(task, await self._shares.read(connection, task.uid))
        row.state = ShareRow.STATE_RUNNING
        await self._shares.put(connection, task.uid, row)
        await self._evaluations.begin(connection, task.uid)

    async def reporting(
        self, connection: AsyncConnection, task: Task, events: Sequence[event_pb2.Event]
    ) -> None:
        """Let progress be that of the whole: what all shares have answered."""
        told = [event.progress for event in events if event.HasField("progress")]
        if not told:
            return
        rows = await self._shares.read(connection, task.uid)
        row = _of(task, rows)
        for progress in told:
            row.num_answered = progress.completed if progress.total else row.num_answered
            progress.CopyFrom(_summed(rows, f"share {task.share} of {len(rows)}: {progress.phase}"))
        await self._shares.put(connection, task.uid, row)
        await self._evaluations.advance(connection, task.uid, told[-1])

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Keep answers for the attempts after this one, and for who scores them."""
        await self._evaluations.keep_answers(connection, task.uid, task.share, step, files)
        return f"{task.subject}/shares/{task.share}/checkpoints/{step}"

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The attempt was lost: the evaluation waits where nobody else is at work."""
        rows = await self._shares.read(connection, task.uid)
        row = _of(task, rows)
        row.state, row.num_answered = ShareRow.STATE_QUEUED, 0
        await self._shares.put(connection, task.uid, row)
        if any(one.state == ShareRow.STATE_RUNNING for one in rows):
            phase = f"share {task.share} of {len(rows)}: lost, another attempt follows"
            await self._evaluations.advance(connection, task.uid, _summed(rows, phase))
        else:
            await self._evaluations.requeue(connection, task.uid)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """All answers of the share are there. Raises InvalidArgument for a result of other records."""
        await self._end(connection, task, ShareRow.STATE_ANSWERED, result)
        await self._conclude(connection, task.uid)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The share failed, and with it the evaluation, once the workers of the others have stopped."""
        await self._end(connection, task, ShareRow.STATE_ENDED, result, failure)
        await self._evaluations.family.stop(connection, task.uid)
        await self._conclude(connection, task.uid)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The share stopped, with what was answered before: on request, or because another one failed."""
        await self._end(connection, task, ShareRow.STATE_ENDED, result)
        await self._conclude(connection, task.uid)

    async def _end(
        self,
        connection: AsyncConnection,
        task: Task,
        state: ShareRow.State.ValueType,
        result: task_pb2.TaskResult | None,
        failure: Failure | None = None,
    ) -> None:
        row = _of(task, await self._shares.read(connection, task.uid))
        row.state = state
        if failure is not None:
            row.error.CopyFrom(failure_to_status(failure))
        if result is not None and result.answer_share.HasField("predictions"):
            row.predictions.CopyFrom(await self._predictions(row.share, result.answer_share))
        await self._shares.put(connection, task.uid, row)

    async def _predictions(
        self, share: task_pb2.AnswerShare, result: task_pb2.AnswerShareResult
    ) -> PredictionFile:
        rows = all_rows(share)
        if result.num_records != len(rows):
            description = f"must be {len(rows)}, the records of the share, got {result.num_records}"
            field = "result.answer_share.num_records"
            raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
        field = "result.answer_share.predictions"
        file = await found_rows(self._blobs, result.predictions.sha256, len(rows), field)
        return PredictionFile(
            sha256=file.sha256, size_bytes=file.size_bytes, num_rows=file.num_rows, first_row=rows.start
        )

    async def _conclude(self, connection: AsyncConnection, uid: str) -> None:
        """Go on with the whole once no share is waited for; the shares that a failure stopped have done so already."""
        rows = await self._shares.read(connection, uid)
        if not rows or any(row.state in _AWAITED for row in rows):
            return
        evaluation = await self._evaluations.family.of_uid(connection, uid)
        failed = next((row.error for row in rows if row.HasField("error")), None)
        if failed is not None:
            await self._evaluations.fail(connection, uid, status_to_failure(failed), None)
        elif evaluation.message.state == State.STATE_CANCELLING or any(
            row.state != ShareRow.STATE_ANSWERED for row in rows
        ):
            await self._evaluations.end_cancelled(connection, uid, None)
        else:
            await self._evaluations.close(connection, evaluation)


def _of(task: Task, rows: Sequence[ShareRow]) -> ShareRow:
    return next(row for row in rows if row.share.number == task.share)


def _summed(rows: Sequence[ShareRow], phase: str) -> event_pb2.Progress:
    return event_pb2.Progress(
        phase=phase,
        completed=sum(row.num_answered for row in rows),
        total=sum(num_answers(row.share) for row in rows),
        unit="answers",
    )
