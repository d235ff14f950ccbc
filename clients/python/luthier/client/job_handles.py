"""One job in the hand: what can be done with it, without saying its name again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.client.events import state_of
from luthier.client.notebooks import resource_html
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.client.async_driver import AsyncStream
    from luthier.client.jobs import AsyncJobs, Jobs
    from luthier.client.metric_table import MetricTable
    from luthier.client.sync_driver import Stream
    from luthier.v1.event_pb2 import Event
    from luthier.v1.webhook_pb2 import WebhookDelivery


class JobHandle:
    """A job of `Client`. `last_seen` is the job as it was when a method last brought it."""

    def __init__(self, jobs: Jobs, last_seen: FineTuningJob) -> None:
        self._jobs = jobs
        self.last_seen = last_seen

    def __repr__(self) -> str:
        return _words(self.last_seen)

    def _repr_html_(self) -> str | None:
        return resource_html(self.refresh())

    @property
    def name(self) -> str:
        """Of the job, in full."""
        return self.last_seen.name

    @property
    def state(self) -> str:
        """Where it stood when it was last seen: RUNNING."""
        return state_of(self.last_seen)

    def refresh(self) -> FineTuningJob:
        """Return the job as it is now."""
        self.last_seen = self._jobs.get(self.name)
        return self.last_seen

    def wait(
        self, *, timeout_seconds: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> FineTuningJob:
        """Return the job once it SUCCEEDED. Raises as `Jobs.wait`."""
        self.last_seen = self._jobs.wait(self.name, timeout_seconds=timeout_seconds, on_event=on_event)
        return self.last_seen

    def cancel(self) -> FineTuningJob:
        """Ask it to stop."""
        self.last_seen = self._jobs.cancel(self.name)
        return self.last_seen

    def pause(self) -> FineTuningJob:
        """Ask it to pause, with a checkpoint of its last step."""
        self.last_seen = self._jobs.pause(self.name)
        return self.last_seen

    def resume(self) -> FineTuningJob:
        """Queue it again once it is PAUSED."""
        self.last_seen = self._jobs.resume(self.name)
        return self.last_seen

    def metrics(self) -> MetricTable:
        """Return its metrics so far."""
        return self._jobs.metric_table(self.name)

    def watch(self, *, start_sequence: int = 0) -> Stream[Event]:
        """Follow its events until its final state."""
        return self._jobs.watch(self.name, start_sequence=start_sequence, uid=self.last_seen.uid)

    def events(self) -> Stream[Event]:
        """Go through its events so far."""
        return self._jobs.events(self.name)

    def checkpoints(self) -> Stream[Checkpoint]:
        """Go through its checkpoints, in order of steps."""
        return self._jobs.checkpoints(self.name)

    def deliveries(self) -> Stream[WebhookDelivery]:
        """Go through what became of telling its webhooks."""
        return self._jobs.deliveries(self.name)


class AsyncJobHandle:
    """A job of `AsyncClient`, otherwise as `JobHandle`."""

    def __init__(self, jobs: AsyncJobs, last_seen: FineTuningJob) -> None:
        self._jobs = jobs
        self.last_seen = last_seen

    def __repr__(self) -> str:
        return _words(self.last_seen)

    def _repr_html_(self) -> str | None:
        # As it was last seen: whoever draws a cell cannot wait.
        return resource_html(self.last_seen)

    @property
    def name(self) -> str:
        """Of the job, in full."""
        return self.last_seen.name

    @property
    def state(self) -> str:
        """Where it stood when it was last seen: RUNNING."""
        return state_of(self.last_seen)

    async def refresh(self) -> FineTuningJob:
        """Return the job as it is now."""
        self.last_seen = await self._jobs.get(self.name)
        return self.last_seen

    async def wait(
        self, *, timeout_seconds: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> FineTuningJob:
        """Return the job once it SUCCEEDED. Raises as `AsyncJobs.wait`."""
        self.last_seen = await self._jobs.wait(self.name, timeout_seconds=timeout_seconds, on_event=on_event)
        return self.last_seen

    async def cancel(self) -> FineTuningJob:
        """Ask it to stop."""
        self.last_seen = await self._jobs.cancel(self.name)
        return self.last_seen

    async def pause(self) -> FineTuningJob:
        """Ask it to pause, with a checkpoint of its last step."""
        self.last_seen = await self._jobs.pause(self.name)
        return self.last_seen

    async def resume(self) -> FineTuningJob:
        """Queue it again once it is PAUSED."""
        self.last_seen = await self._jobs.resume(self.name)
        return self.last_seen

    async def metrics(self) -> MetricTable:
        """Return its metrics so far."""
        return await self._jobs.metric_table(self.name)

    def watch(self, *, start_sequence: int = 0) -> AsyncStream[Event]:
        """Follow its events until its final state."""
        return self._jobs.watch(self.name, start_sequence=start_sequence, uid=self.last_seen.uid)

    def events(self) -> AsyncStream[Event]:
        """Go through its events so far."""
        return self._jobs.events(self.name)

    def checkpoints(self) -> AsyncStream[Checkpoint]:
        """Go through its checkpoints, in order of steps."""
        return self._jobs.checkpoints(self.name)

    def deliveries(self) -> AsyncStream[WebhookDelivery]:
        """Go through what became of telling its webhooks."""
        return self._jobs.deliveries(self.name)


def _words(job: FineTuningJob) -> str:
    return f"<job {job.name}, last seen {state_of(job)}>"
