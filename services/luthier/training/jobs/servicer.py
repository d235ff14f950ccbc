"""TrainingService on the wire."""

from __future__ import annotations

from typing import Any

import grpc.aio

from luthier.runtime.field_limits import limit_violations, refuse, whole
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens, fingerprint, page_size
from luthier.runtime.policies import policy_of
from luthier.runtime.server import Registration, of_families
from luthier.training.jobs.rollouts import Place
from luthier.training.jobs.rules import MAX_STEPS
from luthier.training.jobs.service import JobService
from luthier.training.names import CHECKPOINT, JOB
from luthier.v1 import fine_tuning_job_pb2, training_service_pb2, training_service_pb2_grpc
from luthier.work.listing import ENTRIES_A_PAGE, PAGE_BYTES, entries_page
from luthier.work.standard_methods import StandardMethods

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
POLICY = policy_of(
    SERVICE,
    reads=(
        "PlanFineTuningJob",
        "GetFineTuningJob",
        "ListFineTuningJobs",
        "WatchFineTuningJob",
        "ListFineTuningJobEvents",
        "ListFineTuningJobDeliveries",
        "ReadFineTuningJobMetrics",
        "GetCheckpoint",
        "ListCheckpoints",
        "ListRollouts",
    ),
    changes=(
        "CreateFineTuningJob",
        "CancelFineTuningJob",
        "PauseFineTuningJob",
        "ResumeFineTuningJob",
        "DeleteFineTuningJob",
        "UndeleteFineTuningJob",
        "PurgeFineTuningJob",
    ),
    tasks=("GetFineTuningJob",),
)


class TrainingServicer:
    """TrainingService."""

    def __init__(self, jobs: JobService, page_tokens: PageTokens) -> None:
        self._jobs = jobs
        self._page_tokens = page_tokens
        family = jobs.family
        standard = StandardMethods(pattern=JOB, tokens=page_tokens)
        self.GetFineTuningJob = standard.get(family.message)
        self.ListFineTuningJobs = standard.list(
            jobs.list_page,
            lambda found, token: training_service_pb2.ListFineTuningJobsResponse(
                fine_tuning_jobs=found, next_page_token=token
            ),
        )
        self.CancelFineTuningJob = standard.cancel(family.cancel)
        self.PauseFineTuningJob = standard.change(jobs.pausing.pause)
        self.ResumeFineTuningJob = standard.change(jobs.pausing.resume)
        self.DeleteFineTuningJob = standard.delete(jobs.delete)
        self.UndeleteFineTuningJob = standard.undelete(family.undeleting)
        self.PurgeFineTuningJob = standard.purge(family.undeleting)
        self.WatchFineTuningJob = standard.watch(family.watch)
        self.ListFineTuningJobEvents = standard.events(
            family,
            lambda found, token: training_service_pb2.ListFineTuningJobEventsResponse(
                events=found, next_page_token=token
            ),
        )
        self.ListFineTuningJobDeliveries = standard.deliveries(
            family,
            lambda found, token: training_service_pb2.ListFineTuningJobDeliveriesResponse(
                deliveries=found, next_page_token=token
            ),
        )

    async def PlanFineTuningJob(
        self, request: training_service_pb2.PlanFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningPlan:
        """Say what a job would do."""
        PROJECT.parse(request.parent, field="parent")
        return await self._jobs.plan(request)

    async def CreateFineTuningJob(
        self, request: training_service_pb2.CreateFineTuningJobRequest, context: Context
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Queue a job."""
        PROJECT.parse(request.parent, field="parent")
        return await self._jobs.create(request)

    async def ReadFineTuningJobMetrics(
        self, request: training_service_pb2.ReadFineTuningJobMetricsRequest, context: Context
    ) -> training_service_pb2.ReadFineTuningJobMetricsResponse:
        """Page through a job's metrics."""
        JOB.parse(request.name)
        uid = await self._jobs.family.uid_of(request.name)
        points, token = await entries_page(
            self._page_tokens, request, uid, self._jobs.metrics, lambda point: point.step
        )
        return training_service_pb2.ReadFineTuningJobMetricsResponse(points=points, next_page_token=token)

    async def GetCheckpoint(
        self, request: training_service_pb2.GetCheckpointRequest, context: Context
    ) -> fine_tuning_job_pb2.Checkpoint:
        """Read one checkpoint."""
        CHECKPOINT.parse(request.name)
        return await self._jobs.checkpoint(request.name)

    async def ListCheckpoints(
        self, request: training_service_pb2.ListCheckpointsRequest, context: Context
    ) -> training_service_pb2.ListCheckpointsResponse:
        """Page through a job's checkpoints."""
        JOB.parse(request.parent, field="parent")
        uid = await self._jobs.family.uid_of(request.parent)
        found, token = await entries_page(
            self._page_tokens, request, uid, self._jobs.checkpoints, lambda point: point.step
        )
        return training_service_pb2.ListCheckpointsResponse(checkpoints=found, next_page_token=token)

    async def ListRollouts(
        self, request: training_service_pb2.ListRolloutsRequest, context: Context
    ) -> training_service_pb2.ListRolloutsResponse:
        """Page through a job's rollouts."""
        JOB.parse(request.parent, field="parent")
        refuse(limit_violations(request, {"step": whole(0, MAX_STEPS)}))
        uid = await self._jobs.family.uid_of(request.parent)
        limit = page_size(request.page_size, default=ENTRIES_A_PAGE)
        bound = fingerprint("ListRollouts", uid, str(request.step))
        parts = self._page_tokens.decode(request.page_token, bound)
        first = Place() if parts is None else Place(step=int(parts[0]), index=int(parts[1]))
        found, after = await self._jobs.rollouts.page(uid, first, request.step, limit, PAGE_BYTES)
        token = "" if after is None else self._page_tokens.encode((str(after.step), str(after.index)), bound)
        return training_service_pb2.ListRolloutsResponse(rollouts=found, next_page_token=token)


def registration(jobs: TrainingServicer) -> Registration:
    """Return how to add the service to a server."""
    add = training_service_pb2_grpc.add_TrainingServiceServicer_to_server
    return of_families(SERVICE, add, (jobs,))
