"""TrainingService on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container
from typing import Any

import grpc.aio

from luthier.runtime.auth import Kind
from luthier.runtime.names import check_name, require_project
from luthier.runtime.paging import PageTokens, page_size
from luthier.training.jobs.rules import State
from luthier.training.jobs.service import JobService
from luthier.training.names import CHECKPOINT, JOB
from luthier.v1 import event_pb2, fine_tuning_job_pb2, training_service_pb2, training_service_pb2_grpc
from luthier.work.listing import row_page_arguments

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
    """TrainingService."""

    def __init__(self, jobs: JobService, page_tokens: PageTokens, projects: Container[str]) -> None:
        self._jobs = jobs
        self._page_tokens = page_tokens
        self._projects = projects

    async def PlanFineTuningJob(
        self, request: training_service_pb2.PlanFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningPlan:
        """Say what a job would do."""
        require_project(request.parent, self._projects)
        return await self._jobs.plan(request)

    async def CreateFineTuningJob(
        self, request: training_service_pb2.CreateFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Queue a job."""
        require_project(request.parent, self._projects)
        return await self._jobs.create(request)

    async def GetFineTuningJob(
        self, request: training_service_pb2.GetFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Read one job."""
        check_name(JOB, request.name, self._projects)
        return (await self._jobs.family.read(request.name)).message

    async def ListFineTuningJobs(
        self, request: training_service_pb2.ListFineTuningJobsRequest, context: Context
    ) -> training_service_pb2.ListFineTuningJobsResponse:
        """Page through jobs."""
        require_project(request.parent, self._projects)
        values, token = await self._jobs.list_page(request, self._page_tokens)
        return training_service_pb2.ListFineTuningJobsResponse(fine_tuning_jobs=values, next_page_token=token)

    async def CancelFineTuningJob(
        self, request: training_service_pb2.CancelFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Ask a job to stop."""
        check_name(JOB, request.name, self._projects)
        return await self._jobs.family.cancel(request.name, request.etag, State.STATE_CANCELLING)

    async def DeleteFineTuningJob(
        self, request: training_service_pb2.DeleteFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Delete one job."""
        check_name(JOB, request.name, self._projects)
        return await self._jobs.delete(request.name, request.etag)

    async def WatchFineTuningJob(
        self, request: training_service_pb2.WatchFineTuningJobRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream a job's events."""
        check_name(JOB, request.name, self._projects)
        async for event in self._jobs.family.watch(request.name, request.start_sequence):
            yield event

    async def ListFineTuningJobEvents(
        self, request: training_service_pb2.ListFineTuningJobEventsRequest, context: Context
    ) -> training_service_pb2.ListFineTuningJobEventsResponse:
        """Page through a job's events."""
        check_name(JOB, request.parent, self._projects, field="parent")
        uid = (await self._jobs.family.read(request.parent)).uid
        limit, last, bound = self._place("ListFineTuningJobEvents", uid, request)
        events = await self._jobs.events(uid, last + 1, limit + 1)
        page = training_service_pb2.ListFineTuningJobEventsResponse(events=events[:limit])
        if len(events) > limit:
            page.next_page_token = self._page_tokens.encode((str(events[limit - 1].sequence),), bound)
        return page

    async def ReadFineTuningJobMetrics(
        self, request: training_service_pb2.ReadFineTuningJobMetricsRequest, context: Context
    ) -> training_service_pb2.ReadFineTuningJobMetricsResponse:
        """Page through a job's metrics."""
        check_name(JOB, request.name, self._projects)
        uid = (await self._jobs.family.read(request.name)).uid
        limit, last, bound = self._place("ReadFineTuningJobMetrics", uid, request)
        points = await self._jobs.metrics(uid, last, limit + 1)
        page = training_service_pb2.ReadFineTuningJobMetricsResponse(points=points[:limit])
        if len(points) > limit:
            page.next_page_token = self._page_tokens.encode((str(points[limit - 1].step),), bound)
        return page

    async def GetCheckpoint(
        self, request: training_service_pb2.GetCheckpointRequest, context: Context
    ) -> fine_tuning_job_pb2.Checkpoint:
        """Read one checkpoint."""
        check_name(CHECKPOINT, request.name, self._projects)
        return await self._jobs.checkpoint(request.name)

    async def ListCheckpoints(
        self, request: training_service_pb2.ListCheckpointsRequest, context: Context
    ) -> training_service_pb2.ListCheckpointsResponse:
        """Page through a job's checkpoints."""
        check_name(JOB, request.parent, self._projects, field="parent")
        uid = (await self._jobs.family.read(request.parent)).uid
        limit, last, bound = self._place("ListCheckpoints", uid, request)
        checkpoints = await self._jobs.checkpoints(uid, last, limit + 1)
        page = training_service_pb2.ListCheckpointsResponse(checkpoints=checkpoints[:limit])
        if len(checkpoints) > limit:
            page.next_page_token = self._page_tokens.encode((str(checkpoints[limit - 1].step),), bound)
        return page

    def _place(self, method: str, uid: str, request: Any) -> tuple[int, int, str]:
        """Return page size, number of the last entry of the page before (0: none), and what binds tokens."""
        limit = page_size(request.page_size, default=ENTRIES_A_PAGE)
        last, bound = row_page_arguments(self._page_tokens, method, (uid,), request.page_token)
        return limit, last, bound
