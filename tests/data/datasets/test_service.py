import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.stores import open_database

from luthier.data import schema
from luthier.data.datasets.rules import State
from luthier.data.datasets.service import DatasetService
from luthier.data.uploads.service import UploadService
from luthier.errors import (
    AlreadyExists,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
)
from luthier.errors.status import failure_to_status
from luthier.storage.memory_blobs import MemoryBlobStore, MemoryStaging
from luthier.v1.data_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    StartUploadRequest,
    WriteUploadRequest,
)
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_ALPACA,
    INVALID_RECORD_POLICY_STRICT,
    Dataset,
    DatasetSource,
    DatasetStatistics,
    DatasetVersion,
    RecordError,
    SplitSettings,
)
from luthier.v1.upload_pb2 import Upload
from luthier.work import schema as work_schema
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.repository import Tasks
from luthier.work.tasks import NewTask, Task, TaskKind
from luthier.worker.v1.task_pb2 import BlobFile, BuildVersionResult, Shard

PROJECT = "projects/default"
DATASET = f"{PROJECT}/datasets/news"
STATISTICS = DatasetStatistics(num_records=3, num_records_read=3)


class PlainQueue:
    """Stores tasks as the queue does, without leases."""

    def __init__(self) -> None:
        self.added: list[NewTask] = []

    async def enqueue(self, connection: object, new: NewTask) -> Task:
        self.added.append(new)
        return await Tasks().add(connection, new)  # type: ignore[arg-type]

    async def request_cancel(self, connection: object, uid: str) -> bool:
        raise AssertionError(f"nobody asks to stop {uid} here")


class Bench:
    def __init__(self, root: Path) -> None:
        self.database = open_database(root / "data")
        self.log = EventLog(self.database)
        self.queue = PlainQueue()
        self.uploads = UploadService(self.database, MemoryStaging(MemoryBlobStore()), 1 << 20, Keeping())
        self.service = DatasetService(self.database, self.log, self.queue, self.uploads, Keeping())

    async def uploaded(self, *, complete: bool = True) -> str:
        announced = StartUploadRequest(parent=PROJECT, upload=Upload(filename="a.jsonl"))
        upload = await self.uploads.start(announced)
        data = upload.name.encode()
        await self.uploads.write(
            upload.name, WriteUploadRequest(offset=0, data=data, crc32=zlib.crc32(data), finish=complete)
        )
        return upload.name

    async def create(self, version_id: str, *uploads: str, **wanted: Any) -> DatasetVersion:
        """Ask for a version of `DATASET`, or of the dataset `parent`."""
        parent = wanted.pop("parent", DATASET)
        version = DatasetVersion(sources=[DatasetSource(upload=upload) for upload in uploads], **wanted)
        return await self.service.create_version(
            CreateDatasetVersionRequest(parent=parent, dataset_version_id=version_id, dataset_version=version)
        )

    async def create_dataset(self, dataset_id: str, display_name: str, labels: dict[str, str]) -> Dataset:
        dataset = Dataset(display_name=display_name, labels=labels)
        return await self.service.create_dataset(
            CreateDatasetRequest(parent=PROJECT, dataset_id=dataset_id, dataset=dataset)
        )

    async def version(self, name: str) -> DatasetVersion:
        return (await self.service.versions.read(name)).message

    async def move(self, connection: AsyncConnection, name: str, state: int) -> None:
        await self.service.versions.move(connection, await self.service.versions.get(connection, name), state)

    async def states(self, name: str) -> list[str]:
        async with self.database.reading() as connection:
            uid = (await self.service.versions.get(connection, name)).uid
            events = await self.log.read(connection, uid, 1, 100)
        return [event.state_change.state for event in events if event.HasField("state_change")]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    async with bench.database.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
        await connection.run_sync(work_schema.metadata.create_all)
    await bench.create_dataset("news", "News", {"team": "a"})
    yield bench
    await bench.database.close()


def result(*shards: Shard, errors: int = 0) -> BuildVersionResult:
    return BuildVersionResult(
        shards=shards,
        statistics=STATISTICS,
        digest="ab",
        formats=[DATASET_FORMAT_ALPACA],
        errors=[
            RecordError(
                filename="a.jsonl", line=line, path="p", reason="MISSING_FIELD", message="m", value="v"
            )
            for line in range(1, errors + 1)
        ],
    )


def shard(first_row: int, num_rows: int) -> Shard:
    file = BlobFile(path="r", sha256="0" * 64, size_bytes=1)
    return Shard(file=file, first_row=first_row, num_rows=num_rows)


async def test_create_version_queues_a_task_and_keeps_the_uploads_blob(bench: Bench) -> None:
    upload = await bench.uploaded()
    version = await bench.create("v1", upload)
    assert version.name == f"{DATASET}/versions/v1"
    assert (version.state, version.sources[0].filename) == (State.STATE_QUEUED, "a.jsonl")
    private = (await bench.service.versions.read(version.name)).private
    assert [file.size_bytes for file in private.source_files] == [len(upload)]
    assert version.invalid_record_policy == INVALID_RECORD_POLICY_STRICT
    assert bench.queue.added == [
        NewTask(kind=TaskKind.BUILD_VERSION, uid=version.uid, subject=version.name, project="default")
    ]
    assert await bench.version(version.name) == version
    assert await bench.states(version.name) == ["QUEUED"]


async def test_create_version_checks_its_uploads_and_leaves_nothing_behind(bench: Bench) -> None:
    incomplete = await bench.uploaded(complete=False)
    cases: list[tuple[str, type[LuthierError], str]] = [
        (incomplete, FailedPrecondition, Reason.UPLOAD_INCOMPLETE),
        (f"{PROJECT}/uploads/nothing", NotFound, Reason.RESOURCE_NOT_FOUND),
        ("uploads/nothing", InvalidArgument, Reason.INVALID_FIELD),
        ("", InvalidArgument, Reason.FIELD_REQUIRED),
    ]
    for upload, kind, reason in cases:
        with pytest.raises(kind) as caught:
            await bench.create("v1", upload)
        assert caught.value.reason == reason, upload
    with pytest.raises(NotFound):
        await bench.version(f"{DATASET}/versions/v1")
    assert bench.queue.added == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (SplitSettings(test_fraction=1.0), "test_fraction: must be in [0, 1), got 1"),
        (SplitSettings(validation_fraction=-0.1), "validation_fraction: must be in [0, 1), got -0.1"),
        (SplitSettings(validation_fraction=float("nan")), "got nan"),
        (
            SplitSettings(validation_fraction=0.5, test_fraction=0.5),
            "together must be below 1, got 0.5 + 0.5",
        ),
    ],
)
async def test_create_version_refuses_shares_that_are_not_valid(
    bench: Bench, settings: SplitSettings, problem: str
) -> None:
    upload = await bench.uploaded()
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("", upload, split_settings=settings)
    assert problem in caught.value.message


async def test_create_version_names_an_upload_given_twice(bench: Bench) -> None:
    upload = await bench.uploaded()
    with pytest.raises(InvalidArgument, match=r"sources\[1\].upload: must be named once") as caught:
        await bench.create("", upload, upload)
    assert caught.value.violations[0].field == "dataset_version.sources[1].upload"


async def test_create_version_of_no_dataset_or_with_a_taken_id_is_refused(bench: Bench) -> None:
    upload = await bench.uploaded()
    with pytest.raises(NotFound):
        await bench.create("v1", upload, parent=f"{PROJECT}/datasets/none")
    await bench.create("v1", upload)
    with pytest.raises(AlreadyExists):
        await bench.create("v1", upload)


async def test_a_version_becomes_ready_with_what_the_worker_found(bench: Bench) -> None:
    made = await bench.create("", await bench.uploaded())
    name, uid = made.name, made.uid
    async with bench.database.transaction() as connection:
        for state in (State.STATE_BUILDING, State.STATE_QUEUED, State.STATE_BUILDING):
            await bench.move(connection, name, state)
        await bench.service.version_built(connection, uid, result(shard(0, 2), shard(2, 1), errors=3))
    version = await bench.service.ready_version(name)
    message = version.message
    assert message.sources[0].detected_format == DATASET_FORMAT_ALPACA
    assert (message.statistics, message.digest, len(version.private.shards)) == (STATISTICS, "ab", 2)
    assert [error.line for error in await bench.service.list_errors(uid, 0, 2)] == [1, 2]
    assert [error.line for error in await bench.service.list_errors(uid, 2, 2)] == [3]
    assert await bench.states(name) == ["QUEUED", "BUILDING", "QUEUED", "BUILDING", "READY"]


async def test_a_version_with_a_gap_between_its_shards_is_refused(bench: Bench) -> None:
    made = await bench.create("", await bench.uploaded())
    name, uid = made.name, made.uid
    with pytest.raises(InvalidArgument, match=r"shards\[1\]: must hold at least one row from row 2 on"):
        async with bench.database.transaction() as connection:
            await bench.service.version_built(connection, uid, result(shard(0, 2), shard(3, 1)))
    assert (await bench.version(name)).state == State.STATE_QUEUED
    assert await bench.service.list_errors(uid, 0, 10) == []


async def test_a_version_whose_statistics_are_not_its_shards_is_refused(bench: Bench) -> None:
    made = await bench.create("", await bench.uploaded())
    name, uid = made.name, made.uid
    said = "statistics.num_records: must be 2, as many as the shards hold, got 3"
    with pytest.raises(InvalidArgument, match=said):
        async with bench.database.transaction() as connection:
            await bench.service.version_built(connection, uid, result(shard(0, 2)))
    assert (await bench.version(name)).state == State.STATE_QUEUED


async def test_a_failed_version_keeps_its_failure_statistics_and_errors(bench: Bench) -> None:
    made = await bench.create("", await bench.uploaded())
    name, uid = made.name, made.uid
    failure = Failure(code="INVALID_ARGUMENT", reason=Reason.INVALID_RECORDS, message="bad at a.jsonl:1")
    async with bench.database.transaction() as connection:
        await bench.service.version_failed(connection, uid, failure, result(errors=1))
    version = await bench.version(name)
    assert (version.state, version.error) == (State.STATE_FAILED, failure_to_status(failure))
    assert version.statistics == STATISTICS
    assert len(await bench.service.list_errors(uid, 0, 10)) == 1
    with pytest.raises(FailedPrecondition, match=r"it is FAILED: bad at a\.jsonl:1"):
        await bench.service.ready_version(name)
    with pytest.raises(FailedPrecondition, match="never changes again"):
        async with bench.database.transaction() as connection:
            await bench.service.version_built(connection, uid, result(shard(0, 3)))


async def test_create_dataset_names_every_field_that_is_not_valid(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create_dataset("b", "x" * 201, {"Bad": "ok", "good": "a b"})
    assert [violation.field for violation in caught.value.violations] == [
        "dataset.display_name",
        "dataset.labels",
        "dataset.labels",
    ]
    with pytest.raises(
        InvalidArgument, match=r"dataset\.display_name: must hold no control characters.*U\+001B"
    ):
        await bench.create_dataset("b", "\x1b[31m", {})
    with pytest.raises(InvalidArgument, match="dataset_id"):
        await bench.create_dataset("Bad_Id", "", {})
    with pytest.raises(AlreadyExists):
        await bench.create_dataset("news", "", {})
