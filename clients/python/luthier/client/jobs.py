"""Fine-tuning jobs, their events, metrics, checkpoints and rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.client import names
from luthier.client.async_driver import AsyncResource, async_method, async_stream_method
from luthier.client.events import Since, WaitOptions, wait, watch
from luthier.client.flows import Flow, Scope, StreamFlow, call, pages, replaced
from luthier.client.graders import name_reward_models
from luthier.client.job_handles import AsyncJobHandle, JobHandle
from luthier.client.metric_table import MetricTable
from luthier.client.sync_driver import SyncResource, list_method, method, stream_method
from luthier.v1 import training_service_pb2 as api
from luthier.v1.event_pb2 import Event
from luthier.v1.fine_tuning_job_pb2 import (
    Checkpoint,
    DeviceClass,
    FineTuningJob,
    FineTuningPlan,
    MetricPoint,
)
from luthier.v1.rollout_pb2 import Rollout
from luthier.v1.webhook_pb2 import WebhookDelivery

if TYPE_CHECKING:
    from collections.abc import Callable


def plan(scope: Scope, job: FineTuningJob, *, device: DeviceClass | None = None) -> Flow[FineTuningPlan]:
    """Say what a job would do, without starting it, and what it takes on a device. `job` as in `create`."""
    request = api.PlanFineTuningJobRequest(
        parent=names.project(scope.project), fine_tuning_job=_resolved(scope, job), device=device
    )
    return call(scope, lambda stubs: stubs.training.PlanFineTuningJob, request)


def create(scope: Scope, job: FineTuningJob, *, job_id: str = "") -> Flow[FineTuningJob]:
    """Queue a job. Follow it with `watch` or `wait`.

    `job` names `rendering`, `base_model` or `start_from` (short names will do, also in `mixed_renderings` and of reward
    models in a grader) and what else shall differ from the defaults.
    """
    request = api.CreateFineTuningJobRequest(
        parent=names.project(scope.project), fine_tuning_job=_resolved(scope, job), fine_tuning_job_id=job_id
    )
    return call(scope, lambda stubs: stubs.training.CreateFineTuningJob, request)


def get(scope: Scope, name: str) -> Flow[FineTuningJob]:
    """Read one job."""
    request = api.GetFineTuningJobRequest(name=_name(scope, name))
    return call(scope, lambda stubs: stubs.training.GetFineTuningJob, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[FineTuningJob]:
    """Go through the jobs of the project, newest first; with `show_deleted` what is deleted and not purged too."""
    request = api.ListFineTuningJobsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(
        scope, lambda stubs: stubs.training.ListFineTuningJobs, request, lambda page: page.fine_tuning_jobs
    )


def cancel(scope: Scope, name: str, *, etag: str = "") -> Flow[FineTuningJob]:
    """Ask a job to stop; it does within one forward and backward pass. A job that has ended is returned unchanged."""
    request = api.CancelFineTuningJobRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.training.CancelFineTuningJob, request)


def pause(scope: Scope, name: str, *, etag: str = "") -> Flow[FineTuningJob]:
    """Ask a job to pause: its worker ends the step, stores a checkpoint and is free. It may end before.

    One that is paused is returned unchanged. Raises FailedPrecondition for one that has ended or is stopping.
    """
    request = api.PauseFineTuningJobRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.training.PauseFineTuningJob, request)


def resume(scope: Scope, name: str, *, etag: str = "") -> Flow[FineTuningJob]:
    """Queue a paused job again, to go on from its last checkpoint. Raises FailedPrecondition for any other."""
    request = api.ResumeFineTuningJobRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.training.ResumeFineTuningJob, request)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[FineTuningJob]:
    """Delete a job that has ended; its model stays. Its name may be used again."""
    request = api.DeleteFineTuningJobRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.training.DeleteFineTuningJob, request)


def undelete(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[FineTuningJob]:
    """Bring back a job that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteFineTuningJobRequest(name=_name(scope, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.training.UndeleteFineTuningJob, request)


def purge(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[FineTuningJob]:
    """Purge a job that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeFineTuningJobRequest(name=_name(scope, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.training.PurgeFineTuningJob, request)


def watch_events(scope: Scope, name: str, *, start_sequence: int = 0, uid: str = "") -> StreamFlow[Event]:
    """Follow a job's events, each once and in order, until its final state.

    `uid` is that of the resource whose number `start_sequence` is, where another process saw it.
    """
    full = _name(scope, name)
    return watch(
        scope,
        (lambda stubs: stubs.training.WatchFineTuningJob, api.WatchFineTuningJobRequest(name=full)),
        (lambda stubs: stubs.training.GetFineTuningJob, api.GetFineTuningJobRequest(name=full)),
        Since(start_sequence=start_sequence, uid=uid),
    )


def wait_until_done(
    scope: Scope,
    name: str,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Flow[FineTuningJob]:
    """Return the job once it SUCCEEDED.

    Raise `JobFailed` when it fails or is cancelled, DeadlineExceeded when time runs out.
    """
    full = _name(scope, name)
    return wait(
        scope,
        (lambda stubs: stubs.training.WatchFineTuningJob, api.WatchFineTuningJobRequest(name=full)),
        (lambda stubs: stubs.training.GetFineTuningJob, api.GetFineTuningJobRequest(name=full)),
        WaitOptions(timeout_seconds=timeout_seconds, on_event=on_event),
    )


def list_events(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[Event]:
    """Go through the events that a job has so far."""
    request = api.ListFineTuningJobEventsRequest(parent=_name(scope, name), page_size=page_size)
    return pages(
        scope, lambda stubs: stubs.training.ListFineTuningJobEvents, request, lambda page: page.events
    )


def read_metrics(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[MetricPoint]:
    """Go through a job's metrics by step. A step that was made twice shows its last attempt."""
    request = api.ReadFineTuningJobMetricsRequest(name=_name(scope, name), page_size=page_size)
    return pages(
        scope, lambda stubs: stubs.training.ReadFineTuningJobMetrics, request, lambda page: page.points
    )


async def read_metric_table(scope: Scope, name: str) -> MetricTable:
    """Return all metrics of a job so far, to be turned into tables of Arrow and pandas."""
    return MetricTable([point async for point in read_metrics(scope, name, page_size=1000)])


def list_checkpoints(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[Checkpoint]:
    """Go through a job's checkpoints, in order of steps."""
    request = api.ListCheckpointsRequest(parent=_name(scope, name), page_size=page_size)
    return pages(scope, lambda stubs: stubs.training.ListCheckpoints, request, lambda page: page.checkpoints)


def list_rollouts(scope: Scope, name: str, *, step: int = 0, page_size: int = 0) -> StreamFlow[Rollout]:
    """Go through what a reinforcement job drew and how it was rewarded, in order; `step`: of that one alone."""
    request = api.ListRolloutsRequest(parent=_name(scope, name), step=step, page_size=page_size)
    return pages(scope, lambda stubs: stubs.training.ListRollouts, request, lambda page: page.rollouts)


def list_deliveries(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[WebhookDelivery]:
    """Go through what became of telling a job's webhooks that it has ended; nothing while it has not."""
    request = api.ListFineTuningJobDeliveriesRequest(parent=_name(scope, name), page_size=page_size)
    return pages(
        scope, lambda stubs: stubs.training.ListFineTuningJobDeliveries, request, lambda page: page.deliveries
    )


def get_checkpoint(scope: Scope, name: str) -> Flow[Checkpoint]:
    """Read one checkpoint; its short name is `job/checkpoint`."""
    request = api.GetCheckpointRequest(name=names.checkpoint(scope.project, name))
    return call(scope, lambda stubs: stubs.training.GetCheckpoint, request)


def _name(scope: Scope, name: str) -> str:
    return names.child(scope.project, "fineTuningJobs", name)


def _resolved(scope: Scope, job: FineTuningJob) -> FineTuningJob:
    resolved = replaced(
        job,
        base_model=names.child(scope.project, "models", job.base_model) if job.base_model else "",
        rendering=names.child(scope.project, "renderings", job.rendering),
        start_from=names.weights(scope.project, job.start_from) if job.start_from else "",
    )
    for mixed in resolved.mixed_renderings:
        mixed.rendering = names.child(scope.project, "renderings", mixed.rendering)
    if resolved.HasField("reinforcement"):
        name_reward_models(scope.project, resolved.reinforcement.grader)
    return resolved


class Jobs(SyncResource):
    """Fine-tuning jobs."""

    plan = method(plan)
    create = method(create)
    get = method(get)
    list = list_method(list_all)
    cancel = method(cancel)
    pause = method(pause)
    resume = method(resume)
    delete = method(delete)
    undelete = method(undelete)
    purge = method(purge)
    watch = stream_method(watch_events)
    wait = method(wait_until_done)
    events = list_method(list_events)
    metrics = list_method(read_metrics)
    metric_table = method(read_metric_table)
    checkpoints = list_method(list_checkpoints)
    rollouts = list_method(list_rollouts)
    deliveries = list_method(list_deliveries)
    get_checkpoint = method(get_checkpoint)

    def start(self, job: FineTuningJob, *, job_id: str = "") -> JobHandle:
        """Queue a job as `create` does, and return it in the hand."""
        return JobHandle(self, self.create(job, job_id=job_id))

    def handle(self, name: str) -> JobHandle:
        """Return a job that is there in the hand. Raises NotFound."""
        return JobHandle(self, self.get(name))


class AsyncJobs(AsyncResource):
    """Fine-tuning jobs."""

    plan = async_method(plan)
    create = async_method(create)
    get = async_method(get)
    list = async_stream_method(list_all)
    cancel = async_method(cancel)
    pause = async_method(pause)
    resume = async_method(resume)
    delete = async_method(delete)
    undelete = async_method(undelete)
    purge = async_method(purge)
    watch = async_stream_method(watch_events)
    wait = async_method(wait_until_done)
    events = async_stream_method(list_events)
    metrics = async_stream_method(read_metrics)
    metric_table = async_method(read_metric_table)
    checkpoints = async_stream_method(list_checkpoints)
    rollouts = async_stream_method(list_rollouts)
    deliveries = async_stream_method(list_deliveries)
    get_checkpoint = async_method(get_checkpoint)

    async def start(self, job: FineTuningJob, *, job_id: str = "") -> AsyncJobHandle:
        """Queue a job as `create` does, and return it in the hand."""
        return AsyncJobHandle(self, await self.create(job, job_id=job_id))

    async def handle(self, name: str) -> AsyncJobHandle:
        """Return a job that is there in the hand. Raises NotFound."""
        return AsyncJobHandle(self, await self.get(name))
