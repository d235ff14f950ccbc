"""A worker's connection to its service: credential, registration, calls that outlast its absence."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from luthier.errors import AlreadyExists, FailedPrecondition, InvalidArgument, LuthierError, Reason
from luthier.runtime.server import MAX_MESSAGE_BYTES
from luthier.work.peers import Backoff, bearer, error_of, is_fault, is_final
from luthier.work.requirements import Equipment, equipment_message
from luthier.work.tasks import TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

T = TypeVar("T")
CALL_SECONDS = 60.0
_HEARTBEAT_SECONDS = 0.7
"""A heartbeat brings the request to stop, which a task is to hear of within a second."""
FAULT_SECONDS = 120.0
"""INTERNAL and UNKNOWN are repeated this long: a passing fault has passed by then, a lasting one must be told."""
_logger = logging.getLogger(__name__)


class WorkerLink:
    """One worker process's line to its service.

    `call` repeats a call unless the answer is final: work in hand goes on through a restart of the service,
    through its overload, and through faults that pass. `figures` measures the worker: claims and heartbeats bring
    what is new of it.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        worker_id: str,
        credential: str,
        kinds: Sequence[TaskKind],
        lock: str = "",
        equipment: Equipment | None = None,
    ) -> None:
        self.stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self.worker_id = worker_id
        self._credential = credential
        self._kinds = kinds
        self._lock = lock
        self._equipment = equipment or Equipment()
        self._instance = uuid.uuid4().hex
        self._registered = asyncio.Lock()
        self.heartbeat_seconds = 1.0
        self.lease_seconds = 30.0
        self.figures: Callable[[], worker_service_pb2.WorkerFigures | None] = lambda: None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call."""
        return bearer(self._credential)

    async def register(self) -> None:
        """Make this worker known to the service, waiting for the service if need be.

        A former process of the same id that may be alive is waited for once, until it would count as gone.

        Raises:
            AlreadyExists: WORKER_ID_TAKEN; that process is alive.
        """
        request = worker_service_pb2.RegisterWorkerRequest(
            worker=self.worker_id,
            kinds=[task_pb2.TaskKind.Value(f"TASK_KIND_{kind}") for kind in self._kinds],
            code_version=version("luthier"),
            instance=self._instance,
            lock=self._lock,
            equipment=equipment_message(self._equipment),
        )
        async with self._registered:
            try:
                response = await self.call(self.stub.RegisterWorker, request)
            except AlreadyExists as error:
                seconds = (error.retry_after_seconds or 0.0) + 0.5
                _logger.warning(
                    "waiting for the former process", extra={"detail": error.message, "seconds": seconds}
                )
                await asyncio.sleep(seconds)
                response = await self.call(self.stub.RegisterWorker, request)
        self.heartbeat_seconds = min(response.heartbeat_interval_seconds, _HEARTBEAT_SECONDS)
        self.lease_seconds = response.lease_seconds

    async def call(
        self,
        method: Callable[..., Awaitable[T]],
        request: Any,
        *,
        timeout_seconds: float = CALL_SECONDS,
        wanted: Callable[[], bool] = lambda: True,
    ) -> T:
        """Make a call, again and again until the answer is final, `wanted` is False or a fault has lasted.

        `request` is a message, or a function that makes the request stream anew for every try.

        Raises:
            LuthierError: what the service answered, as the error tree.
            InvalidArgument: the message is longer than the service takes.
        """
        if isinstance(request, Message):
            _require_room(request)
        backoff = Backoff()
        faulty_since: float | None = None
        while True:
            try:
                argument = request() if callable(request) else request
                return await method(argument, metadata=self.metadata, timeout=timeout_seconds)
            except grpc.aio.AioRpcError as refused:
                error = error_of(refused)
                now = time.monotonic()
                faulty_since = (faulty_since or now) if is_fault(refused) else None
                lasting = faulty_since is not None and now - faulty_since >= FAULT_SECONDS
                # Bytes wait at home for room; a report is short, and waits here.
                no_room = error.reason == Reason.DISK_FULL and callable(request)
                if is_final(refused) or no_room or lasting or not wanted():
                    raise error from refused
                _logger.info("trying again", extra={"status": error.code, "detail": error.message})
            await asyncio.sleep(backoff.after(error))

    async def claim(
        self, wait_seconds: float, claim: str = "", kinds: Sequence[TaskKind] = ()
    ) -> task_pb2.Task | None:
        """Wait for a task; registers again when the service has forgotten this worker.

        Args:
            wait_seconds: longest wait.
            claim: id of the claim; the same id again brings the same task.
            kinds: kinds to wait for; empty: all of this worker.
        """
        request = worker_service_pb2.ClaimTaskRequest(
            worker=self.worker_id,
            wait_seconds=wait_seconds,
            claim=claim or uuid.uuid4().hex,
            kinds=[task_pb2.TaskKind.Value(f"TASK_KIND_{kind}") for kind in kinds],
            instance=self._instance,
            figures=self.figures(),
        )
        backoff = Backoff()
        while True:
            try:
                response = await self.call(
                    self.stub.ClaimTask, request, timeout_seconds=wait_seconds + CALL_SECONDS
                )
            except FailedPrecondition as error:
                if error.reason != Reason.WRONG_STATE:
                    raise
                await self.register()
                # The same claim again: it may have been answered before the service forgot this worker.
                await asyncio.sleep(backoff.after(error))
            else:
                return response.task if response.HasField("task") else None

    async def claim_patiently(
        self, wait_seconds: float, claim: str, kinds: Sequence[TaskKind]
    ) -> task_pb2.Task | None:
        """Claim as `claim` does; what the service refuses is logged and tried again.

        Raises:
            LuthierError: this process has no place at the service: its credential is refused (a new process
                reads it anew), or another process has its id.
        """
        backoff = Backoff(0.5, 15.0)
        while True:
            try:
                return await self.claim(wait_seconds, claim, kinds)
            except LuthierError as error:
                if error.code in {"UNAUTHENTICATED", "PERMISSION_DENIED", "ALREADY_EXISTS"}:
                    raise
                _logger.error("claim refused", extra={"status": error.code, "detail": error.message})
                await asyncio.sleep(backoff.after(error))


def _require_room(request: Message) -> None:
    size = request.ByteSize()
    if size > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"a {request.DESCRIPTOR.name} must have at most {MAX_MESSAGE_BYTES} bytes, got {size}"
        )
