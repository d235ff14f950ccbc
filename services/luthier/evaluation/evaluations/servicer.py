"""Evaluations on the wire, and their side of the worker protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure
from luthier.evaluation.evaluations.result_rules import RESULT_LIMITS
from luthier.evaluation.evaluations.rules import State
from luthier.evaluation.evaluations.service import EvaluationService
from luthier.evaluation.names import EVALUATION
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens, page_size
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1 import evaluation_service_pb2, event_pb2, fine_tuning_job_pb2
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.listing import PAGE_BYTES, row_page_arguments
from luthier.work.standard_methods import StandardMethods
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class EvaluationsServicer:
    """The evaluations' part of EvaluationService."""

    def __init__(self, evaluations: EvaluationService, page_tokens: PageTokens) -> None:
        self._evaluations = evaluations
        self._page_tokens = page_tokens
        family = evaluations.family
        standard = StandardMethods(pattern=EVALUATION, tokens=page_tokens)
        self.GetEvaluation = standard.get(family.message)
        self.ListEvaluations = standard.list(
            family.page,
            lambda found, token: evaluation_service_pb2.ListEvaluationsResponse(
                evaluations=found, next_page_token=token
            ),
        )
        self.CancelEvaluation = standard.cancel(family.cancel)
        self.DeleteEvaluation = standard.delete(family.delete)
        self.UndeleteEvaluation = standard.undelete(family.undeleting)
        self.PurgeEvaluation = standard.purge(family.undeleting)
        self.WatchEvaluation = standard.watch(family.watch)
        self.ListEvaluationDeliveries = standard.deliveries(
            family,
            lambda found, token: evaluation_service_pb2.ListEvaluationDeliveriesResponse(
                deliveries=found, next_page_token=token
            ),
        )

    async def CreateEvaluation(
        self, request: evaluation_service_pb2.CreateEvaluationRequest, context: Context
    ) -> Evaluation:
        """Queue an evaluation."""
        PROJECT.parse(request.parent, field="parent")
        return await self._evaluations.create(request)

    async def ListPredictions(
        self, request: evaluation_service_pb2.ListPredictionsRequest, context: Context
    ) -> evaluation_service_pb2.ListPredictionsResponse:
        """Page through answers."""
        EVALUATION.parse(request.parent, field="parent")
        evaluation = await self._evaluations.family.read(request.parent)
        limit = page_size(request.page_size, default=200)
        first_row, bound = row_page_arguments(
            self._page_tokens, "ListPredictions", (evaluation.uid,), request.page_token
        )
        found = await self._evaluations.predictions.read(evaluation, first_row, limit, PAGE_BYTES)
        next_row = first_row + len(found)
        more = next_row < evaluation.message.num_records
        token = self._page_tokens.encode((str(next_row),), bound) if more else ""
        return evaluation_service_pb2.ListPredictionsResponse(predictions=found, next_page_token=token)


class EvaluateHandler(FamilyTasks[Evaluation, EvaluationPrivate]):
    """Follows EVALUATE tasks."""

    result_limits = RESULT_LIMITS

    def __init__(self, evaluations: EvaluationService) -> None:
        states = TaskStates(
            queued=State.STATE_QUEUED, begun=State.STATE_RUNNING, cancelled=State.STATE_CANCELLED
        )
        super().__init__(evaluations.family, states)
        self._evaluations = evaluations

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began, or goes on where the shares of others end."""
        await self._evaluations.begin(connection, task.uid)

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to evaluate."""
        return task_pb2.Task(evaluate=await self._evaluations.spec(connection, task.uid))

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        events: Sequence[event_pb2.Event],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        """Show the latest progress."""
        found = [event for event in events if event.HasField("progress")]
        if found:
            await self._evaluations.advance(connection, task.uid, found[-1].progress)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Keep answers for the attempts after this one."""
        await self._evaluations.keep_answers(connection, task.uid, task.share, step, files)
        return f"{task.subject}/checkpoints/{step}"

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """Store the outcome."""
        await self._evaluations.succeed(connection, task.uid, result.evaluate)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """Store why it failed, and what was answered before."""
        await self._evaluations.fail(connection, task.uid, failure, _known(result))

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """It stopped on request, with what was answered before."""
        await self._evaluations.end_cancelled(connection, task.uid, _known(result))

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The attempt was lost."""
        await self._evaluations.requeue(connection, task.uid)


def _known(result: task_pb2.TaskResult | None) -> task_pb2.EvaluateResult | None:
    return result.evaluate if result is not None and result.HasField("evaluate") else None
