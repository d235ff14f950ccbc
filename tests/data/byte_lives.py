"""Two lives of bytes, from the first byte to an empty disk: each is gone on with from wherever a kill left it."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy import ColumnElement, Table, func, select
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.data.test_worker_results import built
from tests.work.collected import collect_later, digests_of, purge_later

from luthier.data import needs as data_needs
from luthier.data import schema
from luthier.data.assembly import PURGED as DATA_PURGED
from luthier.data.datasets.service import DatasetService
from luthier.data.datasets.servicer import BuildVersionHandler
from luthier.data.uploads.service import UploadService
from luthier.errors import AlreadyExists, NotFound
from luthier.runtime.auth import TaskTokens
from luthier.storage import blob_refs
from luthier.storage.database import Database
from luthier.storage.deleted import is_kept
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate
from luthier.training import needs as training_needs
from luthier.training.assembly import PURGED as TRAINING_PURGED
from luthier.training.jobs.repository import Checkpoints, StoredCheckpoint, jobs
from luthier.training.schema import fine_tuning_jobs
from luthier.v1.data_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    StartUploadRequest,
    WriteUploadRequest,
)
from luthier.v1.dataset_pb2 import DatasetSource, DatasetVersion
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob
from luthier.v1.upload_pb2 import Upload
from luthier.work.blob_check import BlobCheck
from luthier.work.blob_needs import Needs
from luthier.work.keeping import DELETED_KEEP_SECONDS, Keeping
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue
from luthier.work.repository import Tasks
from luthier.work.servicer import WorkerServicer
from luthier.work.tasks import NewTask, Task, TaskKind, TaskState
from luthier.work.workers import Workers
from luthier.worker.v1 import task_pb2
from luthier.worker.v1 import worker_service_pb2 as W  # noqa: N812

PARENT = "projects/p"
DATASET = f"{PARENT}/datasets/d"
JOB = f"{PARENT}/fineTuningJobs/j"
LINES = b'{"prompt": "a", "completion": "b"}\n'
ROWS = b"the rows of every version, which are the same"
NEEDS: Mapping[str, Needs] = {"data": data_needs.needs, "training": training_needs.needs}


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

    async def send(self, task: task_pb2.Task, data: bytes) -> task_pb2.BlobFile:
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
        return task_pb2.BlobFile(path="file", sha256=digest, size_bytes=len(data))

    async def claim(self, kind: TaskKind) -> task_pb2.Task:
        number = task_pb2.TaskKind.Value(f"TASK_KIND_{kind}")
        await self.call("RegisterWorker", worker="w", kinds=[number], instance=f"{os.getpid()}", lock="l")
        answer = await self.call("ClaimTask", worker="w", instance=f"{os.getpid()}", wait_seconds=5)
        task: task_pb2.Task = answer.task
        assert task.task, "there is work"
        return task

    async def faults(self) -> list[str]:
        """What is wrong with what is there."""
        checking = BlobCheck(
            database=self.database, blobs=self.blobs, needs=NEEDS[self.kind], grace_seconds=900.0
        )
        return [f"{fault.kind} {fault.who}" async for fault in checking.faults()]


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


async def data_life(site: Site) -> None:
    """A file is uploaded, two versions with the same rows are built of it, and all goes again."""
    staging = LocalStaging(site.folder / "blobs" / "staging", site.blobs)
    uploads = UploadService(site.database, staging, 1 << 20, Keeping())
    datasets = DatasetService(site.database, site.log, site.queue, uploads, Keeping())
    site.queue.register(TaskKind.BUILD_VERSION, BuildVersionHandler(datasets))
    await uploads.finish_left()
    await site.queue.recover()
    # What a service does at once when it starts, however long it was away.
    await collect_later(site.database, site.blobs)
    with suppress(AlreadyExists):
        await datasets.create_dataset(CreateDatasetRequest(parent=PARENT, dataset_id="d"))
    for version in ("v1", "v2"):
        if not is_past(site, version):
            await build(site, datasets, uploads, version)
            note(site, version)
    for version in ("v1", "v2"):
        with suppress(NotFound):
            await datasets.versions.delete(f"{DATASET}/versions/{version}", "")
        await collect_later(site.database, site.blobs)
        if await count(site, schema.dataset_versions, is_kept(schema.dataset_versions)):
            assert sha256(ROWS).hexdigest() in await digests_of(site.blobs), "who is deleted needs them too"
    for name in await live_uploads(site):
        await uploads.delete(name, "")
    await uploads.finish_left()
    await purge_later(site.database, DATA_PURGED)


async def build(site: Site, datasets: DatasetService, uploads: UploadService, version: str) -> None:
    """Bring a version to its end from wherever it is."""
    name = f"{DATASET}/versions/{version}"
    try:
        state = (await datasets.versions.read(name)).message.state
    except NotFound:
        upload = await uploaded(uploads, site)
        wanted = DatasetVersion(sources=[DatasetSource(upload=upload)])
        request = CreateDatasetVersionRequest(
            parent=DATASET, dataset_version=wanted, dataset_version_id=version
        )
        state = (await datasets.create_version(request)).state
    if state != DatasetVersion.STATE_READY:
        task = await site.claim(TaskKind.BUILD_VERSION)
        source = task.build_version.sources[0].file
        read = [piece async for piece in site.blobs.read(source.sha256)]
        assert b"".join(read) == LINES, "what is to be built from is there"
        file = await site.send(task, ROWS)
        await site.call("FinishTask", task=task.task, epoch=task.epoch, result=built(file.sha256))


async def uploaded(uploads: UploadService, site: Site) -> str:
    """Upload the file from wherever that is; return the upload's name."""
    names = await live_uploads(site)
    name = names[0] if names else (await start(uploads)).name
    upload = await uploads.get(name)
    half = len(LINES) // 2
    while upload.state != Upload.STATE_COMPLETE:
        offset = upload.persisted_size_bytes
        data = LINES[:half] if offset == 0 else LINES[offset:]
        chunk = WriteUploadRequest(
            name=name,
            offset=offset,
            data=data,
            crc32=zlib.crc32(data),
            finish=offset + len(data) == len(LINES),
        )
        upload = await uploads.write(name, chunk)
    return name


async def start(uploads: UploadService) -> Upload:
    return await uploads.start(StartUploadRequest(parent=PARENT, upload=Upload(filename="a.jsonl")))


async def live_uploads(site: Site) -> list[str]:
    uploads = schema.uploads.c
    async with site.database.reading() as connection:
        found = await connection.execute(select(uploads.name).where(uploads.delete_time_us.is_(None)))
        return list(found.scalars())


class JobTasks:
    """Follows the tasks of a job that keeps its last checkpoint alone."""

    result_limits: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self._checkpoints = Checkpoints()

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        latest = await self._checkpoints.latest(connection, task.uid)
        spec = task_pb2.TrainSpec()
        if latest is not None:
            spec.checkpoint_step = latest.message.step
            spec.checkpoint_files.extend(latest.private.files)
        return task_pb2.Task(train=spec)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        name = f"{task.subject}/checkpoints/step-{step}"
        message, private = Checkpoint(name=name, uid=name, step=step), CheckpointPrivate(files=files)
        if await self._checkpoints.add(
            connection, task.uid, StoredCheckpoint(message=message, private=private)
        ):
            await self._checkpoints.drop_older(connection, task.uid, 1)
        return name

    async def nothing(self, *_arguments: Any) -> None:
        """Nothing else is followed."""

    started = lost = cancelled = waits = failed = succeeded = nothing


async def training_life(site: Site) -> None:
    """A job keeps its last checkpoint, each with a file that all have, and is deleted."""
    site.queue.register(TaskKind.TRAIN, JobTasks())  # type: ignore[arg-type]
    await site.queue.recover()
    await collect_later(site.database, site.blobs)
    if not is_past(site, "trained"):
        async with site.database.transaction() as connection:
            job = await jobs().find(connection, JOB)
            if job is None:
                message = FineTuningJob(name=JOB, state=FineTuningJob.STATE_RUNNING)
                job = await jobs().insert(connection, message, FineTuningJobPrivate())
                new = NewTask(kind=TaskKind.TRAIN, uid=job.uid, subject=JOB, project="p", resources=())
                await site.queue.enqueue(connection, new)
            [task] = await Tasks().of_resource(connection, job.uid)
        if task.state is not TaskState.DONE:
            await train(site)
        note(site, "trained")
    async with site.database.transaction() as connection:
        job = await jobs().find(connection, JOB)
        if job is not None:
            await jobs().delete(connection, job, DELETED_KEEP_SECONDS)
    await collect_later(site.database, site.blobs)
    if await count(site, fine_tuning_jobs, is_kept(fine_tuning_jobs)):
        assert await digests_of(site.blobs), "it may come back"
    await purge_later(site.database, TRAINING_PURGED)


async def count(site: Site, table: Table, *which: ColumnElement[bool]) -> int:
    counted = select(func.count().label("number")).select_from(table).where(*which)
    rows = await site.database.rows(counted)
    return int(rows[0]["number"])


async def train(site: Site) -> None:
    """Go on from the last checkpoint to the end."""
    task = await site.claim(TaskKind.TRAIN)
    of_task: dict[str, Any] = {"task": task.task, "epoch": task.epoch}
    for file in task.train.checkpoint_files:
        assert await site.blobs.size(file.sha256) == file.size_bytes, "what is gone on from is there"
    for step in range(task.train.checkpoint_step + 1, 4):
        files = [await site.send(task, data) for data in (b"config", b"state %d" % step)]
        for file, path in zip(files, ("config", "state"), strict=True):
            file.path = path
        await site.call("CommitCheckpoint", **of_task, step=step, files=files)
        await collect_later(site.database, site.blobs)
        found = await digests_of(site.blobs)
        assert found == {file.sha256 for file in files}, "the last one's files are there, and no others"
    await site.call("FinishTask", **of_task, cancelled=True)


def note(site: Site, place: str) -> None:
    (site.folder / place).touch()


def is_past(site: Site, place: str) -> bool:
    return (site.folder / place).exists()


LIVES = {"data": data_life, "training": training_life}


async def live(folder: Path, kind: str) -> None:
    """Live a life from wherever it is to its end: then there is nothing left."""
    async with site_in(folder, kind) as site:
        await LIVES[kind](site)
        await collect_later(site.database, site.blobs)
        assert await digests_of(site.blobs) == set(), "the disk comes back"
        for table in (blob_refs.blob_refs, blob_refs.loose_blobs):
            assert await count(site, table) == 0, f"{table.name} is empty"
    # Opened once more, which sweeps what a kill left aside.
    LocalBlobStore(folder / "blobs")
    left = [path.name for path in (folder / "blobs").rglob("*") if path.is_file()]
    assert left == [], "nothing is left beside blobs either"


async def check(folder: Path, kind: str) -> list[str]:
    """Return what is wrong with what a killed process left."""
    async with site_in(folder, kind) as site:
        return await site.faults()
