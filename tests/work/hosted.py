"""A small hosted service with one kind of task, and a worker in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
from tests.stores import service_urls
from tests.work.conftest import RecordingHandler, new_task, uid_of

from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.storage.blobs import BlobStore
from luthier.storage.opening import open_stores
from luthier.work.host import Hosted, Parts, ServiceSettings, hosting
from luthier.work.keeping import Keeping
from luthier.work.peers import bearer
from luthier.work.queue import QueueSettings
from luthier.work.running import Runner
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until
from luthier.worker.v1 import worker_service_pb2_grpc

KINDS = (TaskKind.TRAIN, TaskKind.REGISTER_MODEL)


@dataclass
class Site:
    """A running service: its parts, its handler, and where it listens."""

    home: Path
    port: int
    parts: Parts
    handler: RecordingHandler
    keys: Keys

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def blobs(self) -> BlobStore:
        return self.parts.blobs

    async def enqueue(self, subject: str = "jobs/a", kind: TaskKind = TaskKind.TRAIN) -> None:
        async with self.parts.database.transaction() as connection:
            await self.parts.queue.enqueue(connection, new_task(subject, kind))

    async def until(self, done: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that the worker brings about."""
        async with asyncio.timeout(seconds):
            while not done():  # noqa: ASYNC110 - a worker's thread brings it about, not this loop
                await asyncio.sleep(0.02)

    @property
    def states(self) -> list[str]:
        return [name for name, _ in self.handler.calls]

    async def texts(self, subject: str = "jobs/a") -> list[str]:
        """Log lines of a subject, in order."""
        async with self.parts.database.reading() as connection:
            events = await self.parts.log.read(connection, uid_of(subject), 1, 10_000)
        return [event.log.text for event in events if event.HasField("log")]

    @asynccontextmanager
    async def wire(self, secret: str | None = None) -> AsyncIterator[tuple[Any, Any]]:
        """A stub of the worker protocol, and the metadata to call with."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
            yield stub, bearer(secret or self.keys.worker_key)

    def settings(self, worker_id: str = "w", **changes: Any) -> WorkerSettings:
        """How to run a worker of this service."""
        settings = WorkerSettings(
            service_address=self.address,
            worker_id=worker_id,
            credential=self.keys.worker_key,
            work_folder=self.home / "work" / worker_id,
            cache_folder=self.home / "cache",
            cache_bytes=1 << 30,
            drain_seconds=10.0,
        )
        return replace(settings, **changes)

    @asynccontextmanager
    async def worker(
        self, runner: Runner, worker_id: str = "w", **changes: Any
    ) -> AsyncIterator[asyncio.Event]:
        """A worker for the length of a block; yields the event that tells it to stop."""
        stopping = asyncio.Event()
        runners = dict.fromkeys(KINDS, runner)
        working = asyncio.create_task(work_until(self.settings(worker_id, **changes), runners, stopping))
        try:
            yield stopping
        finally:
            stopping.set()
            await asyncio.wait_for(working, 20)


@asynccontextmanager
async def serve(
    home: Path, port: int = 0, lease_seconds: float = 30.0, min_free_bytes: int = 0, **settings: Any
) -> AsyncIterator[Site]:
    """Host the service; on the same port and home again it is the same service restarted."""
    kept: dict[str, Any] = {}

    def build(parts: Parts) -> Hosted:
        kept["parts"] = parts
        kept["handler"] = RecordingHandler(parts.log)
        return Hosted(registrations=[], handlers=dict.fromkeys(KINDS, kept["handler"]), policy={})

    own_tables = home / "migrations"
    own_tables.mkdir(parents=True, exist_ok=True)
    plan = ServiceSettings(
        name="small",
        home=home,
        address=f"127.0.0.1:{port}",
        metrics_address="127.0.0.1:0",
        projects=("p",),
        migrations=own_tables,
        kinds=KINDS,
        keeping=Keeping(),
        queue=QueueSettings(lease_seconds=lease_seconds, max_losses=3),
        min_free_bytes=min_free_bytes,
        **service_urls(home, "small"),
        **settings,
    )
    async with hosting(plan, build, open_stores) as bound:
        yield Site(home, bound, kept["parts"], kept["handler"], read_or_create_keys(home))
