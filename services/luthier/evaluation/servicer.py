"""EvaluationService on the wire, and the evaluations' and generations' side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure
from luthier.evaluation.evaluations.convert import (
    answer_file_from_proto,
    arm_result_from_proto,
    comparison_from_proto,
    evaluation_from_proto,
    evaluation_to_proto,
    evaluation_to_spec,
    prediction_from_bytes,
)
from luthier.evaluation.evaluations.domain import Evaluation, Outcome, PredictionFile, Progress
from luthier.evaluation.evaluations.prediction_file import found_predictions
from luthier.evaluation.evaluations.service import EvaluationService
from luthier.evaluation.generation.convert import (
    order_to_proto,
    piece_from_proto,
    piece_to_proto,
    wish_from_proto,
)
from luthier.evaluation.generation.domain import Order
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.generation.service import GenerationService
from luthier.runtime.auth import Policy
from luthier.runtime.names import require_project
from luthier.runtime.paging import PageTokens, page_size
from luthier.runtime.server import Registration
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.resources import Resources
from luthier.v1 import (
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    event_pb2,
    fine_tuning_job_pb2,
)
from luthier.work.events import Entry, Progressed
from luthier.work.listing import PAGE_BYTES, list_page, page_that_fits, row_page_arguments
from luthier.work.log import EventLog
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2, worker_service_pb2

_METHODS = evaluation_service_pb2.DESCRIPTOR.services_by_name["EvaluationService"].methods
POLICY: Policy = {f"/luthier.v1.EvaluationService/{method.name}": frozenset({"key"}) for method in _METHODS}
Context = grpc.aio.ServicerContext[Any, Any]


class EvaluationServicer(evaluation_service_pb2_grpc.EvaluationServiceServicer):
    """Translates, delegates, translates."""

    def __init__(
        self,
        database: Database,
        resources: Resources[Evaluation],
        log: EventLog,
        page_tokens: PageTokens,
        projects: Sequence[str],
        evaluations: EvaluationService,
        generations: GenerationService,
    ) -> None:
        self._database = database
        self._resources = resources
        self._log = log
        self._page_tokens = page_tokens
        self._projects = projects
        self._evaluations = evaluations
        self._generations = generations

    async def CreateEvaluation(
        self, request: evaluation_service_pb2.CreateEvaluationRequest, context: Context
    ) -> evaluation_pb2.Evaluation:
        """Queue an evaluation."""
        draft = evaluation_from_proto(request.evaluation)
        return evaluation_to_proto(
            await self._evaluations.create(request.parent, draft, request.evaluation_id)
        )

    async def GetEvaluation(
        self, request: evaluation_service_pb2.GetEvaluationRequest, context: Context
    ) -> evaluation_pb2.Evaluation:
        """Read one evaluation."""
        return evaluation_to_proto(await self._evaluations.get(request.name))

    async def ListEvaluations(
        self, request: evaluation_service_pb2.ListEvaluationsRequest, context: Context
    ) -> evaluation_service_pb2.ListEvaluationsResponse:
        """Page through evaluations; a page of great ones holds fewer."""
        require_project(request.parent, self._projects)
        return await page_that_fits(request, self._evaluations_page)

    async def _evaluations_page(
        self, request: evaluation_service_pb2.ListEvaluationsRequest
    ) -> tuple[evaluation_service_pb2.ListEvaluationsResponse, int]:
        values, token = await list_page(self._database, self._resources, self._page_tokens, request)
        page = evaluation_service_pb2.ListEvaluationsResponse(
            evaluations=[evaluation_to_proto(value) for value in values], next_page_token=token
        )
        return page, len(values)

    async def CancelEvaluation(
        self, request: evaluation_service_pb2.CancelEvaluationRequest, context: Context
    ) -> evaluation_pb2.Evaluation:
        """Ask an evaluation to stop."""
        return evaluation_to_proto(await self._evaluations.cancel(request.name, request.etag))

    async def WatchEvaluation(
        self, request: evaluation_service_pb2.WatchEvaluationRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream an evaluation's events."""
        await self._evaluations.get(request.name)
        async for event in self._log.watch(request.name, request.start_sequence):
            yield event

    async def ListPredictions(
        self, request: evaluation_service_pb2.ListPredictionsRequest, context: Context
    ) -> evaluation_service_pb2.ListPredictionsResponse:
        """Page through answers."""
        limit = page_size(request.page_size, default=200)
        first_row, bound = row_page_arguments(
            self._page_tokens, "ListPredictions", (request.parent,), request.page_token
        )
        evaluation = await self._evaluations.get(request.parent)
        rows = await self._evaluations.predictions(evaluation, first_row, limit, PAGE_BYTES)
        next_row = first_row + len(rows)
        token = self._page_tokens.encode((str(next_row),), bound) if next_row < evaluation.num_records else ""
        return evaluation_service_pb2.ListPredictionsResponse(
            predictions=[prediction_from_bytes(row) for row in rows], next_page_token=token
        )

    async def GenerateText(
        self, request: evaluation_service_pb2.GenerateTextRequest, context: Context
    ) -> AsyncIterator[evaluation_service_pb2.GenerateTextResponse]:
        """Stream an answer."""
        async for piece in self._generations.generate(wish_from_proto(request)):
            yield piece_to_proto(piece)


def registration(servicer: EvaluationServicer) -> Registration:
    """Return how to add the servicer to a server."""
    return Registration(
        add=evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server,
        servicer=servicer,
        name="luthier.v1.EvaluationService",
    )


class EvaluateHandler:
    """Follows EVALUATE tasks for the evaluations they work for."""

    def __init__(self, evaluations: EvaluationService, blobs: BlobStore) -> None:
        self._evaluations = evaluations
        self._blobs = blobs

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to evaluate."""
        evaluation, answers = await self._evaluations.find(connection, task.subject)
        return task_pb2.Task(evaluate=evaluation_to_spec(evaluation, answers))

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """An attempt began."""
        await self._evaluations.begin(connection, task.subject)

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        entries: Sequence[Entry],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        """Show the latest progress."""
        steps = [entry.payload for entry in entries if isinstance(entry.payload, Progressed)]
        if steps:
            last = steps[-1]
            progress = Progress(
                phase=last.phase,
                completed=last.completed,
                total=last.total,
                unit=last.unit,
                remaining_seconds=last.remaining_seconds,
            )
            await self._evaluations.advance(connection, task.subject, progress)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Keep answers for the attempts after this one."""
        kept = [answer_file_from_proto(file) for file in files]
        await self._evaluations.keep_answers(connection, task.subject, step, kept)
        return f"{task.subject}/checkpoints/{step}"

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """Store the outcome."""
        message = result.evaluate
        outcome = Outcome(
            arm_results=tuple(arm_result_from_proto(arm) for arm in message.arm_results),
            comparisons=tuple(comparison_from_proto(one) for one in message.comparisons),
            predictions=await found_predictions(self._blobs, message.predictions.sha256, message.num_records),
            warnings=tuple(message.warnings),
        )
        await self._evaluations.succeed(connection, task.subject, outcome)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """Store why it failed, and what was answered before."""
        await self._evaluations.fail(connection, task.subject, failure, await self._known(result))

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """It stopped on request, with what was answered before."""
        await self._evaluations.end_cancelled(connection, task.subject, await self._known(result))

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The attempt was lost."""
        await self._evaluations.requeue(connection, task.subject)

    async def _known(self, result: task_pb2.TaskResult | None) -> PredictionFile | None:
        if result is None or not result.evaluate.HasField("predictions"):
            return None
        known = result.evaluate
        return await found_predictions(self._blobs, known.predictions.sha256, known.num_records)


class WorkerGenerations:
    """The exchange in the words of the worker protocol."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def take(
        self, worker: str, slots: int
    ) -> AsyncIterator[worker_service_pb2.TakeGenerationsResponse]:
        """Yield orders and cancels for one worker until it goes away."""
        async for message in self._exchange.take(slots):
            if isinstance(message, Order):
                yield worker_service_pb2.TakeGenerationsResponse(order=order_to_proto(message))
            else:
                yield worker_service_pb2.TakeGenerationsResponse(cancel_generation=message)

    async def push(self, request: worker_service_pb2.PushGenerationRequest) -> None:
        """Take a piece of an answer; NotFound when nobody waits for it."""
        self._exchange.push(piece_from_proto(request))
