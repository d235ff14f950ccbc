"""A service's state, a worker that is one with it, and what a life of bytes asks of them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy import ColumnElement, Table, func, select
from tests.work.collected import collect_later

from luthier.data import needs as data_needs
from luthier.evaluation import needs as evaluation_needs
from luthier.runtime.auth import TaskTokens
from luthier.storage.database import Database
from luthier.storage.local_blobs import LocalBlobStore
from luthier.training import needs as training_needs
from luthier.work.blob_check import BlobCheck
from luthier.work.blob_needs import Needs
from luthier.work.hold_check import Holder, hold_faults
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue
from luthier.work.servicer import WorkerServicer
from luthier.work.tasks import TaskKind
from luthier.work.workers import Workers
from luthier.worker.v1 import task_pb2
from luthier.worker.v1 import worker_service_pb2 as W  # noqa: N812

PARENT = "projects/p"
NEEDS: Mapping[str, Needs] = {
    "data": data_needs.needs,
    "training": training_needs.needs,
    "evaluation": evaluation_needs.needs,
}
HOLDERS: Mapping[str, Sequence[Holder]] = {
    "data": data_needs.HOLDERS,
    "training": training_needs.HOLDERS,
    "evaluation": evaluation_needs.HOLDERS,
}


class Peer:
    """The context of a call from another machine."""

    def peer(self) -> str:
        return "ipv4:10.0.0.1:1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A service's state, and a worker of it that is one with it."""

    kind: str
    folder: Path
    database: Database
    blobs: LocalBlobStore
    log: EventLog
    queue: Queue
    worker: WorkerServicer

    async def call(self, method: str, **fields: Any) -> Any:
        context: Any = Peer()
        return await getattr(self.worker, method)(getattr(W, f"{method}Request")(**fields), context)

    async def send(self, task: task_pb2.Task, data: bytes, path: str = "file") -> task_pb2.BlobFile:
        """Give the service a file as workers do, and collect at the worst moments."""
        digest = sha256(data).hexdigest()
        of_task: dict[str, Any] = {"task": task.task, "epoch": task.epoch}
        granted = await self.call("GrantBlob", **of_task, sha256=[digest])
        await collect_later(self.database, self.blobs)
        if granted.missing_sha256:

            async def sent() -> AsyncIterator[W.PutBlobRequest]:
                yield W.PutBlobRequest(**of_task, sha256=digest, data=data)

            context: Any = Peer()
            await self.worker.PutBlob(sent(), context)
            await collect_later(self.database, self.blobs)
        assert await self.blobs.has(digest), "it was promised"
        return task_pb2.BlobFile(path=path, sha256=digest, size_bytes=len(data))

    async def claim(self, *kinds: TaskKind) -> task_pb2.Task:
        numbers = [task_pb2.TaskKind.Value(f"TASK_KIND_{kind}") for kind in kinds]
        await self.call("RegisterWorker", worker="w", kinds=numbers, instance=f"{os.getpid()}", lock="l")
        answer = await self.call("ClaimTask", worker="w", instance=f"{os.getpid()}", wait_seconds=5)
        task: task_pb2.Task = answer.task
        assert task.task, "there is work"
        return task

    async def faults(self) -> list[str]:
        """What is wrong with what is there."""
        checking = BlobCheck(
            database=self.database, blobs=self.blobs, needs=NEEDS[self.kind], grace_seconds=900.0
        )
        faults = [fault async for fault in checking.faults()]
        async with self.database.reading() as connection:
            faults += [fault async for fault in hold_faults(connection, HOLDERS[self.kind])]
        return [f"{fault.kind} {fault.who}" for fault in faults]

    async def count(self, table: Table, *which: ColumnElement[bool]) -> int:
        counted = select(func.count().label("number")).select_from(table).where(*which)
        return int((await self.database.rows(counted))[0]["number"])

    def note(self, place: str) -> None:
        """Remember that a life has come to a place, for whoever goes on with it."""
        (self.folder / place).touch()

    def is_past(self, place: str) -> bool:
        return (self.folder / place).exists()


@asynccontextmanager
async def site_in(folder: Path, kind: str) -> AsyncIterator[Site]:
    """Open the state of a service as it does when it starts."""
    database = Database(f"sqlite+aiosqlite:///{folder / 'service.db'}")
    blobs = LocalBlobStore(folder / "blobs")
    log = EventLog(database)
    metrics = WorkMetrics(CollectorRegistry(), tuple(TaskKind))
    queue = Queue(database, log, metrics)
    worker = WorkerServicer(queue, Workers(metrics), blobs, TaskTokens("secret" * 8))
    try:
        yield Site(
            kind=kind, folder=folder, database=database, blobs=blobs, log=log, queue=queue, worker=worker
        )
    finally:
        await database.close()
