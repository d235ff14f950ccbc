"""A worker's connection to its service: credential, registration, calls that outlast its absence."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import grpc

from luthier.errors import FailedPrecondition, Reason
from luthier.work.peers import bearer, error_of, is_passing
from luthier.work.tasks import TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

T = TypeVar("T")
CALL_SECONDS = 60.0
_HEARTBEAT_SECONDS = 0.7
"""A heartbeat brings the request to stop, which a task is to hear of within a second."""
_logger = logging.getLogger(__name__)


class WorkerLink:
    """One worker process's line to its service.

    `call` repeats a call while the service is away: work in hand goes on through a restart of the service.
    """

    def __init__(
        self, channel: grpc.aio.Channel, worker_id: str, credential: str, kinds: Sequence[TaskKind]
    ) -> None:
        self.stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self.worker_id = worker_id
        self.metadata = bearer(credential)
        self._kinds = kinds
        self._instance = uuid.uuid4().hex
        self._registered = asyncio.Lock()
        self.heartbeat_seconds = 1.0

    async def register(self) -> None:
        """Make this worker known to the service, waiting for the service if need be."""
        request = worker_service_pb2.RegisterWorkerRequest(
            worker=self.worker_id,
            kinds=[task_pb2.TaskKind.Value(f"TASK_KIND_{kind}") for kind in self._kinds],
            code_version=version("luthier"),
            instance=self._instance,
        )
        async with self._registered:
            response = await self.call(self.stub.RegisterWorker, request)
        self.heartbeat_seconds = min(response.heartbeat_interval_seconds, _HEARTBEAT_SECONDS)

    async def call(
        self,
        method: Callable[..., Awaitable[T]],
        request: Any,
        *,
        timeout_seconds: float = CALL_SECONDS,
    ) -> T:
        """Make a call, again and again while the service is away, or its disk full.

        `request` is a message, or a function that makes the request stream anew for every try.

        Raises:
            LuthierError: what the service answered, as the error tree.
        """
        delay_seconds = 0.1
        while True:
            try:
                argument = request() if callable(request) else request
                return await method(argument, metadata=self.metadata, timeout=timeout_seconds)
            except grpc.aio.AioRpcError as error:
                told = error_of(error)
                # Bytes wait at home for room; a report is short, and waits here.
                waits = told.reason == Reason.DISK_FULL and not callable(request)
                if not is_passing(error) and not waits:
                    raise told from error
                _logger.info("trying again", extra={"status": told.code, "detail": told.message})
            await asyncio.sleep(delay_seconds * random.uniform(0.8, 1.2))
            delay_seconds = min(delay_seconds * 2, 3.0)

    async def claim(self, wait_seconds: float) -> task_pb2.Task | None:
        """Wait for a task; registers again when the service has forgotten this worker."""
        request = worker_service_pb2.ClaimTaskRequest(worker=self.worker_id, wait_seconds=wait_seconds)
        try:
            response = await self.call(
                self.stub.ClaimTask, request, timeout_seconds=wait_seconds + CALL_SECONDS
            )
        except FailedPrecondition as error:
            if error.reason != Reason.WRONG_STATE:
                raise
            await self.register()
            return None
        return response.task if response.HasField("task") else None
