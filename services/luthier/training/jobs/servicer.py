"""TrainingService on the wire, and its side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping, Sequence
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure
from luthier.runtime.auth import Kind
from luthier.runtime.names import require_project
from luthier.runtime.paging import PageTokens, page_size
from luthier.training.jobs.convert import (
    checkpoint_to_proto,
    files_from_proto,
    job_request,
    job_to_proto,
    plan_to_proto,
    point_to_proto,
    run_record_from_proto,
    train_spec,
)
from luthier.training.jobs.lifecycle import JobLifecycle
from luthier.training.jobs.service import JobService
from luthier.training.names import CHECKPOINT, JOB, check_name
from luthier.v1 import event_pb2, fine_tuning_job_pb2, training_service_pb2, training_service_pb2_grpc
from luthier.work.convert import event_to_proto
from luthier.work.events import Entry
from luthier.work.listing import row_page_arguments
from luthier.work.log import EventLog
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
_FOR_TASKS = frozenset({"GetFineTuningJob"})
_KEY: frozenset[Kind] = frozenset({"key"})
_KEY_OR_TASK: frozenset[Kind] = frozenset({"key", "task"})
POLICY = {
    f"/{SERVICE.full_name}/{method.name}": _KEY_OR_TASK if method.name in _FOR_TASKS else _KEY
    for method in SERVICE.methods
}
ENTRIES_A_PAGE = 200
add_to_server = training_service_pb2_grpc.add_TrainingServiceServicer_to_server


class TrainingServicer(training_service_pb2_grpc.TrainingServiceServicer):
    """Translates, delegates, translates."""

    def __init__(
        self, jobs: JobService, log: EventLog, page_tokens: PageTokens, projects: Container[str]
    ) -> None:
        self._jobs = jobs
        self._log = log
        self._page_tokens = page_tokens
        self._projects = projects

    async def PlanFineTuningJob(
        self, request: training_service_pb2.PlanFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningPlan:
        """Say what a job would do."""
        require_project(request.parent, self._projects)
        wanted = job_request(request.fine_tuning_job)
        planned = await self._jobs.plan(request.parent, wanted)
        draft = self._jobs.draft(request.parent, "", wanted, planned.checked)
        return plan_to_proto(planned.plan, draft)

    async def CreateFineTuningJob(
        self, request: training_service_pb2.CreateFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Queue a job."""
        require_project(request.parent, self._projects)
        wanted = job_request(request.fine_tuning_job)
        return job_to_proto(await self._jobs.create(request.parent, request.fine_tuning_job_id, wanted))

    async def GetFineTuningJob(
        self, request: training_service_pb2.GetFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Read one job."""
        check_name(JOB, request.name, self._projects)
        return job_to_proto(await self._jobs.get(request.name))

    async def ListFineTuningJobs(
        self, request: training_service_pb2.ListFineTuningJobsRequest, context: Context
    ) -> training_service_pb2.ListFineTuningJobsResponse:
        """Page through jobs."""
        require_project(request.parent, self._projects)
        values, token = await self._jobs.list_page(request, self._page_tokens)
        return training_service_pb2.ListFineTuningJobsResponse(
            fine_tuning_jobs=[job_to_proto(value) for value in values], next_page_token=token
        )

    async def CancelFineTuningJob(
        self, request: training_service_pb2.CancelFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Ask a job to stop."""
        check_name(JOB, request.name, self._projects)
        return job_to_proto(await self._jobs.cancel(request.name, request.etag))

    async def WatchFineTuningJob(
        self, request: training_service_pb2.WatchFineTuningJobRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream a job's events."""
        check_name(JOB, request.name, self._projects)
        await self._jobs.get(request.name)
        async for event in self._log.watch(request.name, request.start_sequence):
            yield event

    async def ListFineTuningJobEvents(
        self, request: training_service_pb2.ListFineTuningJobEventsRequest, context: Context
    ) -> training_service_pb2.ListFineTuningJobEventsResponse:
        """Page through a job's events."""
        check_name(JOB, request.parent, self._projects, field="parent")
        limit, last, bound = self._place("ListFineTuningJobEvents", request.parent, request)
        events = await self._jobs.events(request.parent, last + 1, limit + 1)
        page = training_service_pb2.ListFineTuningJobEventsResponse(
            events=[event_to_proto(event) for event in events[:limit]]
        )
        if len(events) > limit:
            page.next_page_token = self._page_tokens.encode((str(events[limit - 1].sequence),), bound)
        return page

    async def ReadFineTuningJobMetrics(
        self, request: training_service_pb2.ReadFineTuningJobMetricsRequest, context: Context
    ) -> training_service_pb2.ReadFineTuningJobMetricsResponse:
        """Page through a job's metrics."""
        check_name(JOB, request.name, self._projects)
        limit, last, bound = self._place("ReadFineTuningJobMetrics", request.name, request)
        points = await self._jobs.metrics(request.name, last, limit + 1)
        page = training_service_pb2.ReadFineTuningJobMetricsResponse(
            points=[point_to_proto(point) for point in points[:limit]]
        )
        if len(points) > limit:
            page.next_page_token = self._page_tokens.encode((str(points[limit - 1].step),), bound)
        return page

    async def GetCheckpoint(
        self, request: training_service_pb2.GetCheckpointRequest, context: Context
    ) -> fine_tuning_job_pb2.Checkpoint:
        """Read one checkpoint."""
        check_name(CHECKPOINT, request.name, self._projects)
        return checkpoint_to_proto(await self._jobs.checkpoint(request.name))

    async def ListCheckpoints(
        self, request: training_service_pb2.ListCheckpointsRequest, context: Context
    ) -> training_service_pb2.ListCheckpointsResponse:
        """Page through a job's checkpoints."""
        check_name(JOB, request.parent, self._projects, field="parent")
        limit, last, bound = self._place("ListCheckpoints", request.parent, request)
        checkpoints = await self._jobs.checkpoints(request.parent, last, limit + 1)
        page = training_service_pb2.ListCheckpointsResponse(
            checkpoints=[checkpoint_to_proto(checkpoint) for checkpoint in checkpoints[:limit]]
        )
        if len(checkpoints) > limit:
            page.next_page_token = self._page_tokens.encode((str(checkpoints[limit - 1].step),), bound)
        return page

    def _place(self, method: str, scope: str, request: Any) -> tuple[int, int, str]:
        """Return page size, number of the last entry of the page before (0: none), and what binds tokens."""
        limit = page_size(request.page_size, default=ENTRIES_A_PAGE)
        last, bound = row_page_arguments(self._page_tokens, method, (scope,), request.page_token)
        return limit, last, bound


class TrainHandler:
    """Follows TRAIN tasks."""

    def __init__(self, lifecycle: JobLifecycle) -> None:
        self._lifecycle = lifecycle

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to train, and from which checkpoint on."""
        return train_spec(await self._lifecycle.to_train(connection, task.subject))

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began: the job is PREPARING."""
        await self._lifecycle.started(connection, task.subject, task.attempt)

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        entries: Sequence[Entry],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        """Keep metrics, progress and the run record; the first step makes the job RUNNING."""
        record = None if run_record is None else run_record_from_proto(run_record)
        await self._lifecycle.reported(connection, task.subject, task.attempt, entries, record)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Store a checkpoint."""
        return await self._lifecycle.checkpointed(
            connection, task.subject, task.attempt, step, files_from_proto(files), metrics
        )

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The job SUCCEEDED and its tuned model is READY."""
        files = {file.path: (file.sha256, file.size_bytes) for file in result.train.files}
        await self._lifecycle.succeeded(connection, task.subject, result.train.step, files)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The job FAILED."""
        await self._lifecycle.failed(connection, task.subject, failure)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The job is CANCELLED."""
        await self._lifecycle.cancelled(connection, task.subject)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The job is queued again."""
        await self._lifecycle.lost(connection, task.subject)
