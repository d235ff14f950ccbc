import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from luthier.data import schema
from luthier.data.datasets.domain import (
    DatasetFormat,
    DatasetStatistics,
    InvalidRecordPolicy,
    NewVersion,
    RecordError,
    Source,
    VersionOutcome,
    VersionState,
)
from luthier.data.datasets.service import DatasetService
from luthier.data.shards import Shard
from luthier.data.splits import SplitSettings
from luthier.data.uploads.domain import Chunk
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
from luthier.storage.database import Database
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.work import schema as work_schema
from luthier.work.events import StateChanged
from luthier.work.log import EventLog
from luthier.work.repository import Tasks
from luthier.work.tasks import NewTask, Task, TaskKind

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

    async def request_cancel(self, connection: object, subject: str) -> None:
        raise AssertionError(f"nobody asks to stop {subject} here")


class Bench:
    def __init__(self, root: Path) -> None:
        self.database = Database(f"sqlite+aiosqlite:///{root / 'data.db'}")
        self.log = EventLog(self.database)
        self.queue = PlainQueue()
        self.uploads = UploadService(self.database, MemoryBlobStore(), 1 << 20)
        self.service = DatasetService(self.database, self.log, self.queue, self.uploads)

    async def uploaded(self, *, complete: bool = True) -> str:
        upload = await self.uploads.start(PROJECT, "a.jsonl", 0, "")
        data = upload.name.encode()
        await self.uploads.write(
            upload.name, Chunk(offset=0, data=data, crc32=zlib.crc32(data), finish=complete)
        )
        return upload.name

    async def states(self, name: str) -> list[str]:
        async with self.database.reading() as connection:
            events = await self.log.read(connection, name, 1, 100)
        return [
            event.entry.payload.state for event in events if isinstance(event.entry.payload, StateChanged)
        ]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    async with bench.database.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
        await connection.run_sync(work_schema.metadata.create_all)
    await bench.service.create_dataset(PROJECT, "news", "News", {"team": "a"})
    yield bench
    await bench.database.close()


def wanted(*uploads: str, settings: SplitSettings | None = None) -> NewVersion:
    return NewVersion(
        sources=tuple(Source(upload=upload) for upload in uploads),
        invalid_record_policy=InvalidRecordPolicy.STRICT,
        split_settings=settings or SplitSettings(),
        labels={},
    )


def outcome(*shards: Shard, errors: int = 0) -> VersionOutcome:
    return VersionOutcome(
        shards=shards,
        statistics=STATISTICS,
        digest="ab",
        formats=(DatasetFormat.ALPACA,),
        errors=tuple(
            RecordError(
                filename="a.jsonl", line=line, path="p", reason="MISSING_FIELD", message="m", value="v"
            )
            for line in range(1, errors + 1)
        ),
    )


def shard(first_row: int, num_rows: int) -> Shard:
    return Shard(path="r", digest="0" * 64, size_bytes=1, first_row=first_row, num_rows=num_rows)


async def test_create_version_queues_a_task_and_keeps_the_uploads_blob(bench: Bench) -> None:
    upload = await bench.uploaded()
    version = await bench.service.create_version(DATASET, "v1", wanted(upload))
    assert version.name == f"{DATASET}/versions/v1"
    assert (version.state, version.sources[0].filename) == (VersionState.QUEUED, "a.jsonl")
    assert version.sources[0].size_bytes == len(upload)
    assert bench.queue.added == [
        NewTask(kind=TaskKind.BUILD_VERSION, subject=version.name, project="default")
    ]
    assert await bench.service.get_version(version.name) == version
    assert await bench.states(version.name) == ["QUEUED"]


async def test_create_version_checks_its_uploads_and_leaves_nothing_behind(bench: Bench) -> None:
    incomplete = await bench.uploaded(complete=False)
    cases: list[tuple[str, type[LuthierError], str]] = [
        (incomplete, FailedPrecondition, Reason.UPLOAD_INCOMPLETE),
        (f"{PROJECT}/uploads/nothing", NotFound, Reason.RESOURCE_NOT_FOUND),
        ("projects/other/uploads/nothing", InvalidArgument, Reason.CROSS_PROJECT_REFERENCE),
        ("uploads/nothing", InvalidArgument, Reason.INVALID_FIELD),
        ("", InvalidArgument, Reason.FIELD_REQUIRED),
    ]
    for upload, kind, reason in cases:
        with pytest.raises(kind) as caught:
            await bench.service.create_version(DATASET, "v1", wanted(upload))
        assert caught.value.reason == reason, upload
    with pytest.raises(NotFound):
        await bench.service.get_version(f"{DATASET}/versions/v1")
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
        await bench.service.create_version(DATASET, "", wanted(upload, settings=settings))
    assert problem in caught.value.message


async def test_create_version_names_an_upload_given_twice(bench: Bench) -> None:
    upload = await bench.uploaded()
    with pytest.raises(InvalidArgument, match=r"sources\[1\].upload: must be named once") as caught:
        await bench.service.create_version(DATASET, "", wanted(upload, upload))
    assert caught.value.violations[0].field == "dataset_version.sources[1].upload"


async def test_create_version_of_no_dataset_or_with_a_taken_id_is_refused(bench: Bench) -> None:
    upload = await bench.uploaded()
    with pytest.raises(NotFound):
        await bench.service.create_version(f"{PROJECT}/datasets/none", "v1", wanted(upload))
    await bench.service.create_version(DATASET, "v1", wanted(upload))
    with pytest.raises(AlreadyExists):
        await bench.service.create_version(DATASET, "v1", wanted(upload))


async def test_a_version_becomes_ready_with_what_the_worker_found(bench: Bench) -> None:
    name = (await bench.service.create_version(DATASET, "", wanted(await bench.uploaded()))).name
    async with bench.database.transaction() as connection:
        await bench.service.version_started(connection, name)
        await bench.service.version_lost(connection, name)
        await bench.service.version_started(connection, name)
        await bench.service.version_built(connection, name, outcome(shard(0, 2), shard(2, 1), errors=3))
    version = await bench.service.ready_version(name)
    assert version.sources[0].detected_format is DatasetFormat.ALPACA
    assert (version.statistics, version.digest, len(version.shards)) == (STATISTICS, "ab", 2)
    assert [error.line for error in await bench.service.list_errors(name, 0, 2)] == [1, 2]
    assert [error.line for error in await bench.service.list_errors(name, 2, 2)] == [3]
    assert await bench.states(name) == ["QUEUED", "BUILDING", "QUEUED", "BUILDING", "READY"]


async def test_a_version_with_a_gap_between_its_shards_is_refused(bench: Bench) -> None:
    name = (await bench.service.create_version(DATASET, "", wanted(await bench.uploaded()))).name
    with pytest.raises(InvalidArgument, match=r"shards\[1\]: must hold at least one row from row 2 on"):
        async with bench.database.transaction() as connection:
            await bench.service.version_built(connection, name, outcome(shard(0, 2), shard(3, 1)))
    assert (await bench.service.get_version(name)).state is VersionState.QUEUED
    assert await bench.service.list_errors(name, 0, 10) == []


async def test_a_failed_version_keeps_its_failure_statistics_and_errors(bench: Bench) -> None:
    name = (await bench.service.create_version(DATASET, "", wanted(await bench.uploaded()))).name
    failure = Failure(code="INVALID_ARGUMENT", reason=Reason.INVALID_RECORDS, message="bad at a.jsonl:1")
    async with bench.database.transaction() as connection:
        await bench.service.version_failed(connection, name, failure, outcome(errors=1))
    version = await bench.service.get_version(name)
    assert (version.state, version.failure) == (VersionState.FAILED, failure)
    assert version.statistics == STATISTICS
    assert len(await bench.service.list_errors(name, 0, 10)) == 1
    with pytest.raises(FailedPrecondition, match=r"it is FAILED: bad at a\.jsonl:1"):
        await bench.service.ready_version(name)
    with pytest.raises(FailedPrecondition, match="never changes again"):
        async with bench.database.transaction() as connection:
            await bench.service.version_built(connection, name, outcome())


async def test_create_dataset_names_every_field_that_is_not_valid(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.service.create_dataset(PROJECT, "b", "x" * 201, {"Bad": "ok", "good": "a b"})
    assert [violation.field for violation in caught.value.violations] == [
        "dataset.display_name",
        "dataset.labels",
        "dataset.labels",
    ]
    with pytest.raises(
        InvalidArgument, match=r"dataset\.display_name: must hold no control characters.*U\+001B"
    ):
        await bench.service.create_dataset(PROJECT, "b", "\x1b[31m", {})
    with pytest.raises(InvalidArgument, match="dataset_id"):
        await bench.service.create_dataset(PROJECT, "Bad_Id", "", {})
    with pytest.raises(AlreadyExists):
        await bench.service.create_dataset(PROJECT, "news", "", {})
