"""One leased task on the worker's side: heartbeats, events in order, blobs both ways, the outcome."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import grpc

from luthier.errors import FailedPrecondition, InvalidArgument, LuthierError, Reason
from luthier.storage.blobs import PIECE_BYTES
from luthier.storage.inbox import copy_into, place_beside
from luthier.storage.threads import finished_in
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work.link import CALL_SECONDS, FAULT_SECONDS, WorkerLink
from luthier.work.peers import Backoff, error_of, is_fault, is_final
from luthier.worker.v1 import task_pb2, worker_service_pb2

T = TypeVar("T")
_EVENTS_A_CALL = 200
_BYTES_A_CALL = 1 << 20
_BLOB_SECONDS = 3600.0
_logger = logging.getLogger(__name__)


class TaskSession:
    """Speaks with the service about one task while a runner works on it.

    Attributes:
        task: the task as claimed.
        token: credential for other services, refreshed by heartbeats.
        cancel_requested: whether the service asked to stop.
        pause_requested: whether it asked to leave a checkpoint and give the task back.
        lost: whether the lease is gone; nothing may be reported any more.
        num_refused_reports: events and run records that the service refused and that are dropped.
    """

    def __init__(self, link: WorkerLink, task: task_pb2.Task) -> None:
        self.task = task
        self.token = task.token
        self.cancel_requested = False
        self.pause_requested = False
        self.lost = False
        self.num_refused_reports = 0
        self._link = link
        self._last_number = 0
        self._pending: deque[worker_service_pb2.LocalEvent] = deque()
        self._run_record: fine_tuning_job_pb2.RunRecord | None = None
        self._figures: worker_service_pb2.TaskFigures | None = None
        self._more = asyncio.Event()
        self._sending = asyncio.Lock()

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Say that the task arrived, then send heartbeats and events in the background.

        Raises:
            LuthierError: LEASE_LOST already, or another refusal of the first heartbeat.
        """
        await self._beat_once()
        background = [asyncio.create_task(self._beat()), asyncio.create_task(self._send_events())]
        try:
            yield
        finally:
            for job in background:
                job.cancel()
                with suppress(asyncio.CancelledError):
                    await job

    async def _beat(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._link.heartbeat_seconds)
            try:
                await self._beat_once()
            except LuthierError as error:
                self._note(error)

    async def _beat_once(self) -> None:
        request = worker_service_pb2.HeartbeatRequest(
            task=self.task.task, epoch=self.task.epoch, figures=self._link.figures()
        )
        response = await self._link.call(self._link.stub.Heartbeat, request)
        self._hear(response)
        self.token = response.token

    def _hear(
        self, response: worker_service_pb2.HeartbeatResponse | worker_service_pb2.ReportEventsResponse
    ) -> None:
        self.cancel_requested = self.cancel_requested or response.cancel_requested
        self.pause_requested = self.pause_requested or response.pause_requested

    async def _send_events(self) -> None:
        while not self.lost:
            await self._more.wait()
            try:
                await self.flush()
            except LuthierError as error:
                self._note(error)

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: Any, timeout_seconds: float = CALL_SECONDS
    ) -> T:
        """Make a call that is given up when the lease is lost."""
        return await self._link.call(
            method, request, timeout_seconds=timeout_seconds, wanted=lambda: not self.lost
        )

    def _note(self, error: LuthierError) -> None:
        """Remember a lost lease; any other refusal of a report is logged and does not stop the work."""
        if isinstance(error, FailedPrecondition) and error.reason == Reason.LEASE_LOST:
            self.lost = True
            _logger.warning("lease lost", extra={"task": self.task.task, "detail": error.message})
        else:
            _logger.error("report refused", extra={"task": self.task.task, "detail": error.message})

    def add_event(self, event: event_pb2.Event) -> None:
        """Queue an event; it is sent soon, in order."""
        self._last_number += 1
        self._pending.append(worker_service_pb2.LocalEvent(local_number=self._last_number, event=event))
        self._more.set()

    def keep_figures(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Send what was measured of the attempt with the next events, in place of what was measured before."""
        self._figures = figures

    async def keep_run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Send what exactly runs, after everything reported before it. Raises as `flush`."""
        self._run_record = record
        await self.flush()

    async def flush(self) -> None:
        """Send all queued events. What is refused as not valid is dropped by itself, the rest goes on.

        Raises:
            LuthierError: the service refused the report as a whole; the events stay queued.
        """
        async with self._sending:
            self._more.clear()
            while self._pending or self._run_record is not None:
                await self._deliver(self._batch(), self._run_record)

    def _batch(self) -> list[worker_service_pb2.LocalEvent]:
        """Return the first queued events, as many as one call takes."""
        batch: list[worker_service_pb2.LocalEvent] = []
        size = 0
        for event in islice(self._pending, _EVENTS_A_CALL):
            size += event.ByteSize()
            if batch and size > _BYTES_A_CALL:
                break
            batch.append(event)
        return batch

    async def _deliver(
        self,
        events: Sequence[worker_service_pb2.LocalEvent],
        record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        figures, self._figures = self._figures, None
        request = worker_service_pb2.ReportEventsRequest(
            task=self.task.task, epoch=self.task.epoch, events=events, run_record=record, figures=figures
        )
        try:
            self._hear(await self._call(self._link.stub.ReportEvents, request))
        except InvalidArgument as error:
            if events and record is not None:
                await self._deliver((), record)
                await self._deliver(events, None)
                return
            if len(events) > 1:
                half = len(events) // 2
                await self._deliver(events[:half], None)
                await self._deliver(events[half:], None)
                return
            self._count_refused(error)
        # Only now: a call that failed otherwise is made again with the same events.
        while events and self._pending and self._pending[0].local_number <= events[-1].local_number:
            self._pending.popleft()
        if record is not None and self._run_record is record:
            self._run_record = None

    def _count_refused(self, error: LuthierError) -> None:
        self.num_refused_reports += 1
        _logger.error(
            "report refused and dropped",
            extra={"task": self.task.task, "number": self.num_refused_reports, "detail": error.message},
        )
        if self.num_refused_reports == 1:
            text = f"a report of the worker was refused and is not among the events: {error.message}"
            line = event_pb2.LogLine(severity=event_pb2.LogLine.SEVERITY_WARNING, text=text[:1000])
            self.add_event(event_pb2.Event(log=line))

    async def store(self, path: Path, name: str) -> task_pb2.BlobFile:
        """Give the service a file unless it has it: by a folder that both see, else its bytes are sent.

        Raises:
            LuthierError: the service refused.
        """
        sha256, size_bytes = await asyncio.to_thread(_digest, path)
        file = task_pb2.BlobFile(path=name, sha256=sha256, size_bytes=size_bytes)
        wanted = worker_service_pb2.GrantBlobRequest(
            task=self.task.task, epoch=self.task.epoch, sha256=[sha256]
        )
        granted = await self._call(self._link.stub.GrantBlob, wanted)
        if granted.missing_sha256 and not await self._left(path, sha256, granted):
            await self._call(self._link.stub.PutBlob, lambda: self._chunks(path, sha256), _BLOB_SECONDS)
        return file

    async def _left(self, path: Path, sha256: str, granted: worker_service_pb2.GrantBlobResponse) -> bool:
        """Leave a copy of a file where the service takes it from; False: they share no folder, or it was not taken.

        Raises:
            ResourceExhausted: DISK_FULL, as where the bytes are sent.
        """
        if not granted.inbox:
            return False
        with place_beside(Path(granted.inbox)) as file:
            if file is None or not await finished_in(None, copy_into, file, path, granted.min_free_bytes):
                return False
            request = worker_service_pb2.PutBlobRequest(
                task=self.task.task, epoch=self.task.epoch, sha256=sha256, left_in_inbox=Path(file.name).name
            )
            try:
                await self._call(self._link.stub.PutBlob, lambda: iter((request,)), _BLOB_SECONDS)
            except LuthierError as error:
                if error.reason == Reason.DISK_FULL:
                    raise
                # What else is wrong is refused again when the bytes are sent.
                detail = {"task": self.task.task, "status": error.code, "detail": error.message}
                _logger.warning("a file was not taken, its bytes are sent", extra=detail)
                return False
        return True

    async def _chunks(self, path: Path, sha256: str) -> AsyncIterator[worker_service_pb2.PutBlobRequest]:
        head = worker_service_pb2.PutBlobRequest(task=self.task.task, epoch=self.task.epoch, sha256=sha256)
        with path.open("rb") as file:
            head.data = await asyncio.to_thread(file.read, PIECE_BYTES)
            yield head
            while data := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield worker_service_pb2.PutBlobRequest(data=data)

    async def fetch(self, sha256: str) -> AsyncIterator[bytes]:
        """Yield the bytes of one of the service's blobs, going on after a break where it stopped.

        Raises:
            LuthierError: the service refused.
        """
        received = 0
        backoff = Backoff()
        faulty_since: float | None = None
        while True:
            request = worker_service_pb2.GetBlobRequest(
                task=self.task.task, epoch=self.task.epoch, sha256=sha256, offset=received
            )
            try:
                stream = self._link.stub.GetBlob(request, metadata=self._link.metadata, timeout=_BLOB_SECONDS)
                async for response in stream:
                    received += len(response.data)
                    faulty_since = None
                    yield response.data
                return
            except grpc.aio.AioRpcError as refused:
                error, now = error_of(refused), time.monotonic()
                faulty_since = (faulty_since or now) if is_fault(refused) else None
                lasting = faulty_since is not None and now - faulty_since >= FAULT_SECONDS
                if is_final(refused) or lasting or self.lost:
                    raise error from refused
            await asyncio.sleep(backoff.after(error))

    async def commit_checkpoint(
        self,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
        seconds: float = 0.0,
    ) -> str:
        """Commit a checkpoint after everything reported before it; returns its resource name.

        `seconds`: since its copy began; 0: not known.

        Raises:
            LuthierError: the service refused.
        """
        await self.flush()
        request = worker_service_pb2.CommitCheckpointRequest(
            task=self.task.task,
            epoch=self.task.epoch,
            step=step,
            files=files,
            metrics=metrics,
            seconds=seconds,
        )
        return (await self._call(self._link.stub.CommitCheckpoint, request)).checkpoint

    async def commit_rollouts(self, step: int, file: task_pb2.BlobFile, num_rollouts: int) -> None:
        """Commit the rollouts of a step after everything reported before them.

        Raises:
            LuthierError: the service refused.
        """
        await self.flush()
        request = worker_service_pb2.CommitRolloutsRequest(
            task=self.task.task, epoch=self.task.epoch, step=step, file=file, num_rollouts=num_rollouts
        )
        await self._call(self._link.stub.CommitRollouts, request)

    async def finish(self, request: worker_service_pb2.FinishTaskRequest) -> None:
        """Hand in the outcome after everything reported before it.

        Raises:
            LuthierError: the service refused.
        """
        request.task = self.task.task
        request.epoch = self.task.epoch
        await self.flush()
        await self._call(self._link.stub.FinishTask, request)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
