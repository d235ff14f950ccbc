"""WorkerService: the wire side of the queue, the same for every service."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

import grpc.aio
from google.protobuf.message import Message

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.errors.status import status_to_failure
from luthier.runtime.auth import TaskTokens
from luthier.runtime.policies import policy_for
from luthier.storage.blob_refs import digests_in
from luthier.storage.blobs import PIECE_BYTES, BlobStore
from luthier.v1 import device_pb2
from luthier.work.events import reported
from luthier.work.queue import Queue
from luthier.work.requirements import Equipment, read_equipment
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.work.validity import require_valid
from luthier.work.workers import Worker, Workers
from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

MAX_WAIT_SECONDS = 30.0
_MAX_NAME_CHARACTERS = 200
TOKEN_SECONDS = 900.0
SERVICE = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"]
_OF_A_WORKER = "it is about the worker that calls, which works for all projects"
_OF_A_TASK = "it is about a task, which is its worker's by a lease that the queue looks at"
POLICY = policy_for(
    SERVICE,
    "worker",
    subjectless={
        "RegisterWorker": _OF_A_WORKER,
        "ClaimTask": _OF_A_WORKER,
        "TakeGenerations": _OF_A_WORKER,
        "PushGeneration": "it is about an order that the worker was given",
        "Heartbeat": _OF_A_TASK,
        "ReportEvents": _OF_A_TASK,
        "GrantBlob": _OF_A_TASK,
        "PutBlob": _OF_A_TASK,
        "GetBlob": _OF_A_TASK,
        "CommitCheckpoint": _OF_A_TASK,
        "CommitRollouts": _OF_A_TASK,
        "FinishTask": _OF_A_TASK,
    },
)
_WORKER_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
_PROCESS_ID = re.compile(r"[0-9A-Za-z._:-]{0,128}")
_NEAR = ("ipv4:127.", "ipv6:[::1]", "unix:")
Context = grpc.aio.ServicerContext[Any, Any]
_OfTask = (
    worker_service_pb2.HeartbeatRequest
    | worker_service_pb2.ReportEventsRequest
    | worker_service_pb2.GrantBlobRequest
    | worker_service_pb2.PutBlobRequest
    | worker_service_pb2.GetBlobRequest
    | worker_service_pb2.CommitCheckpointRequest
    | worker_service_pb2.CommitRolloutsRequest
)


class Generations(Protocol):
    """Hands orders for text to workers and takes their answers."""

    def take(self, worker: str, slots: int) -> AsyncIterator[worker_service_pb2.TakeGenerationsResponse]:
        """Yield orders and cancels for one worker until it goes away."""
        ...

    async def push(self, request: worker_service_pb2.PushGenerationRequest) -> None:
        """Take a piece of an answer; NotFound when nobody waits for it."""
        ...


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """Translates between the worker protocol and the queue."""

    def __init__(
        self,
        queue: Queue,
        workers: Workers,
        blobs: BlobStore,
        task_tokens: TaskTokens,
        generations: Generations | None = None,
    ) -> None:
        self._queue = queue
        self._promised = queue.promised
        self._workers = workers
        self._blobs = blobs
        self._task_tokens = task_tokens
        self._generations = generations

    async def RegisterWorker(
        self, request: worker_service_pb2.RegisterWorkerRequest, context: Context
    ) -> worker_service_pb2.RegisterWorkerResponse:
        """Make a worker known and free what its former process held."""
        require_valid(request)
        worker = _worker(request)
        self._workers.register(worker, await self._queue.leases_of(worker.worker_id))
        await self._queue.release_worker(worker.worker_id, worker.instance)
        lease_seconds = self._queue.settings.lease_seconds
        return worker_service_pb2.RegisterWorkerResponse(
            lease_seconds=lease_seconds, heartbeat_interval_seconds=lease_seconds / 3
        )

    async def ClaimTask(
        self, request: worker_service_pb2.ClaimTaskRequest, context: Context
    ) -> worker_service_pb2.ClaimTaskResponse:
        """Wait for a task and lease it."""
        require_valid(request)
        worker = self._workers.known(request.worker, request.instance)
        kinds = _kinds(request.kinds) or worker.kinds
        if foreign := sorted(set(kinds) - set(worker.kinds)):
            raise InvalidArgument(
                f"kinds must be among those that the worker registered, got {', '.join(foreign)}",
                metadata={"worker": worker.worker_id},
            )
        if request.HasField("figures"):
            self._workers.measured(worker.holder, request.figures)
        wait_seconds = min(request.wait_seconds, MAX_WAIT_SECONDS)
        with self._workers.waiting(worker):
            claimed = await self._queue.claim(
                worker.holder, kinds, wait_seconds, request.claim, worker.equipment
            )
        if claimed is None:
            return worker_service_pb2.ClaimTaskResponse()
        task, message = claimed
        message.task = task.task_id
        message.epoch = task.epoch
        message.attempt = task.attempt
        message.subject = task.subject
        message.token = self._token(task)
        message.traceparent = task.attempt_traceparent
        return worker_service_pb2.ClaimTaskResponse(task=message)

    async def Heartbeat(
        self, request: worker_service_pb2.HeartbeatRequest, context: Context
    ) -> worker_service_pb2.HeartbeatResponse:
        """Renew a lease."""
        task = await self._heard(request)
        if request.HasField("figures"):
            self._workers.measured(task.worker, request.figures)
        return worker_service_pb2.HeartbeatResponse(
            cancel_requested=task.cancel_requested,
            pause_requested=task.pause_requested,
            token=self._token(task),
        )

    async def ReportEvents(
        self, request: worker_service_pb2.ReportEventsRequest, context: Context
    ) -> worker_service_pb2.ReportEventsResponse:
        """Record a worker's events."""
        task = await self._heard(request)
        numbered = []
        for local in request.events:
            event = reported(local.event, task.attempt, task.share)
            if event is None:
                kind = local.event.WhichOneof("payload")
                raise InvalidArgument(
                    reason=Reason.INVALID_FIELD,
                    message=f"a worker may report progress, metrics and log lines, got {kind}",
                    metadata={"local_number": str(local.local_number)},
                )
            numbered.append((local.local_number, event))
        run_record = request.run_record if request.HasField("run_record") else None
        last = await self._queue.report(request.task, request.epoch, numbered, run_record)
        fresh = [event for number, event in numbered if number > task.last_local_number]
        self._queue.metrics.reported(task, fresh, request.figures if request.HasField("figures") else None)
        return worker_service_pb2.ReportEventsResponse(
            last_local_number=last,
            cancel_requested=task.cancel_requested,
            pause_requested=task.pause_requested,
        )

    async def GrantBlob(
        self, request: worker_service_pb2.GrantBlobRequest, context: Context
    ) -> worker_service_pb2.GrantBlobResponse:
        """Say which blobs are missing, and to who may be on this machine where a copy may be left."""
        await self._heard(request)
        # Before it is looked for: what is said to be there must stay until the worker has named it.
        await self._promised.keep(request.task, request.epoch, request.sha256)
        missing = [digest for digest in request.sha256 if not await self._blobs.has(digest)]
        response = worker_service_pb2.GrantBlobResponse(missing_sha256=missing)
        inbox = await self._blobs.inbox() if missing and _is_near(context.peer()) else None
        if inbox is not None:
            response.inbox, response.min_free_bytes = str(inbox.mark), inbox.min_free_bytes
        return response

    async def PutBlob(
        self,
        request_iterator: AsyncIterator[worker_service_pb2.PutBlobRequest],
        context: Context,
    ) -> worker_service_pb2.PutBlobResponse:
        """Store one blob under its digest."""
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise InvalidArgument(
                reason=Reason.FIELD_REQUIRED, message="the first message must name task, epoch and sha256"
            )
        await self._heard(first)
        await self._promised.keep(first.task, first.epoch, [first.sha256])
        if first.left_in_inbox:
            if first.data:
                raise InvalidArgument(f"data must be empty beside left_in_inbox, got {len(first.data)} bytes")
            blob = await self._blobs.take(first.left_in_inbox, expected_digest=first.sha256)
            return worker_service_pb2.PutBlobResponse(size_bytes=blob.size_bytes)

        async def chunks() -> AsyncIterator[bytes]:
            yield _piece(first)
            async for request in request_iterator:
                yield _piece(request)

        blob = await self._blobs.put(chunks(), expected_digest=first.sha256)
        return worker_service_pb2.PutBlobResponse(size_bytes=blob.size_bytes)

    async def GetBlob(
        self, request: worker_service_pb2.GetBlobRequest, context: Context
    ) -> AsyncIterator[worker_service_pb2.GetBlobResponse]:
        """Stream one blob."""
        await self._heard(request)
        async for data in self._blobs.read(request.sha256, offset=request.offset):
            yield worker_service_pb2.GetBlobResponse(data=data)

    async def CommitCheckpoint(
        self, request: worker_service_pb2.CommitCheckpointRequest, context: Context
    ) -> worker_service_pb2.CommitCheckpointResponse:
        """Make a checkpoint the one to resume from."""
        task = await self._heard(request)
        checkpoint = await self._queue.commit_checkpoint(request, partial(self._require_blobs, request))
        self._queue.metrics.checkpointed(task, request)
        return worker_service_pb2.CommitCheckpointResponse(checkpoint=checkpoint)

    async def CommitRollouts(
        self, request: worker_service_pb2.CommitRolloutsRequest, context: Context
    ) -> worker_service_pb2.CommitRolloutsResponse:
        """Keep what a step drew from its model."""
        await self._heard(request)
        await self._queue.commit_rollouts(request, partial(self._require_blobs, request))
        return worker_service_pb2.CommitRolloutsResponse()

    async def FinishTask(
        self, request: worker_service_pb2.FinishTaskRequest, context: Context
    ) -> worker_service_pb2.FinishTaskResponse:
        """Take the outcome of a task."""
        require_valid(request)
        failed = request.HasField("error")
        if not (failed or request.cancelled or request.paused or request.HasField("result")):
            raise InvalidArgument(
                reason=Reason.FIELD_REQUIRED, message="one of error, cancelled, paused and result must be set"
            )
        outcome = Outcome(
            failure=status_to_failure(request.error) if failed else None,
            cancelled=request.cancelled,
            paused=request.paused,
            result=request.result if request.HasField("result") else None,
        )
        await self._queue.finish(request.task, request.epoch, outcome, partial(self._require_blobs, request))
        return worker_service_pb2.FinishTaskResponse()

    async def TakeGenerations(
        self, request: worker_service_pb2.TakeGenerationsRequest, context: Context
    ) -> AsyncIterator[worker_service_pb2.TakeGenerationsResponse]:
        """Stream orders for text to a worker."""
        require_valid(request)
        self._workers.known(request.worker)
        async for message in self._exchange().take(request.worker, request.slots):
            yield message

    async def PushGeneration(
        self, request: worker_service_pb2.PushGenerationRequest, context: Context
    ) -> worker_service_pb2.PushGenerationResponse:
        """Take a piece of an answer."""
        require_valid(request)
        await self._exchange().push(request)
        return worker_service_pb2.PushGenerationResponse()

    async def _heard(self, request: _OfTask) -> Task:
        require_valid(request)
        task = await self._queue.heartbeat(request.task, request.epoch)
        self._workers.heard(task.worker)
        return task

    def _exchange(self) -> Generations:
        if self._generations is None:
            raise FailedPrecondition(
                reason=Reason.WRONG_STATE,
                message="this service orders no generations, ask the Evaluation service",
            )
        return self._generations

    def _token(self, task: Task) -> str:
        return self._task_tokens.mint(
            project=task.project,
            resources=task.resources,
            epoch=task.epoch,
            task=task.task_id,
            lifetime_seconds=TOKEN_SECONDS,
        )

    async def _require_blobs(self, message: Message) -> None:
        for digest in digests_in(message):
            if not await self._blobs.has(digest):
                raise FailedPrecondition(
                    reason=Reason.BLOB_MISSING,
                    message=f"blob {digest} must be here before it is named; send it with PutBlob first",
                    metadata={"sha256": digest},
                )


def _is_near(peer: str) -> bool:
    """Whether a peer, as gRPC names it, came by this machine's own network."""
    return unquote(peer).startswith(_NEAR)


def _piece(request: worker_service_pb2.PutBlobRequest) -> bytes:
    if len(request.data) > PIECE_BYTES:
        raise InvalidArgument(f"data must have at most {PIECE_BYTES} bytes, got {len(request.data)}")
    return request.data


def _worker(request: worker_service_pb2.RegisterWorkerRequest) -> Worker:
    if not _WORKER_ID.fullmatch(request.worker):
        raise InvalidArgument(
            reason=Reason.INVALID_FIELD,
            message=f"worker must match {_WORKER_ID.pattern}, got {request.worker!r}",
            metadata={"worker": request.worker},
        )
    for name, value in (("instance", request.instance), ("lock", request.lock)):
        if not _PROCESS_ID.fullmatch(value):
            raise InvalidArgument(f"{name} must match {_PROCESS_ID.pattern}, got {value!r}")
    return Worker(
        worker_id=request.worker,
        instance=request.instance,
        kinds=tuple(_kinds(request.kinds)),
        lock=request.lock,
        equipment=_equipment(request.equipment),
        version=request.code_version[:_MAX_NAME_CHARACTERS],
    )


def _equipment(told: worker_service_pb2.Equipment) -> Equipment:
    """Read what a worker says that it has. Raises InvalidArgument for a device or a name that cannot be."""
    if told.device == device_pb2.DEVICE_KIND_GPU:
        raise InvalidArgument("equipment.device must be the kind that the worker has, got GPU")
    if len(told.device_name) > _MAX_NAME_CHARACTERS:
        raise InvalidArgument(
            f"equipment.device_name must have at most {_MAX_NAME_CHARACTERS} characters, got {len(told.device_name)}"
        )
    return read_equipment(told)


def _kinds(numbers: Iterable[task_pb2.TaskKind.ValueType]) -> list[TaskKind]:
    """Read kinds of tasks whose numbers are known."""
    names = [task_pb2.TaskKind.Name(number) for number in numbers]
    if "TASK_KIND_UNSPECIFIED" in names:
        raise InvalidArgument("kinds must name kinds of tasks, got TASK_KIND_UNSPECIFIED")
    return [TaskKind(name.removeprefix("TASK_KIND_")) for name in names]
