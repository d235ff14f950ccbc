import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.stores import open_blobs, open_database, open_staging

from luthier.data import schema
from luthier.data.uploads.rules import MAX_CHUNK_BYTES, State
from luthier.data.uploads.service import UploadService
from luthier.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from luthier.storage.blobs import Blob
from luthier.storage.local_staging import LocalStaging
from luthier.v1.data_service_pb2 import StartUploadRequest, WriteUploadRequest
from luthier.v1.upload_pb2 import Upload
from luthier.work import schema as work_schema
from luthier.work.keeping import Keeping

PROJECT = "projects/default"
LIMIT = 10 << 20
DATA = bytes(range(256)) * 40


class Bench:
    """An upload service on a real database and a real blob store."""

    def __init__(self, root: Path) -> None:
        self.database = open_database(root / "data")
        self.blobs = open_blobs(root / "blobs")
        self.staging = open_staging(root / "staging", self.blobs)
        self.services: list[UploadService] = []
        self.service = self.successor()

    def successor(self) -> UploadService:
        """Return a service that finds what those before it left, as after a start."""
        self.services.append(UploadService(self.database, self.staging, LIMIT, Keeping()))
        return self.services[-1]

    async def started(self, size_bytes: int = 0, sha256: str = "") -> str:
        return (await self.start("a.jsonl", size_bytes, sha256)).name

    async def start(self, filename: str, size_bytes: int, sha256: str) -> Upload:
        upload = Upload(filename=filename, size_bytes=size_bytes, sha256=sha256)
        return await self.service.start(StartUploadRequest(parent=PROJECT, upload=upload))

    async def digest(self, name: str) -> str:
        async with self.database.reading() as connection:
            return (await self.service.completed(connection, name)).private.sha256

    async def settled(self) -> None:
        """Wait for what any of the services clears away after a commit."""
        await asyncio.gather(*(task for service in self.services for task in service._clearing))

    async def staged_bytes(self, name: str) -> int:
        return await self.staging.size((await self.service.get(name)).uid)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    async with bench.database.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
        await connection.run_sync(work_schema.metadata.create_all)
    yield bench
    await bench.settled()
    await bench.database.close()


def chunk(offset: int, data: bytes, *, finish: bool = False, crc32: int | None = None) -> WriteUploadRequest:
    checksum = zlib.crc32(data) if crc32 is None else crc32
    return WriteUploadRequest(offset=offset, data=data, finish=finish, crc32=checksum)


async def test_write_in_chunks_makes_a_blob_of_the_same_bytes(bench: Bench) -> None:
    name = await bench.started(len(DATA), hashlib.sha256(DATA).hexdigest())
    part = await bench.service.write(name, chunk(0, DATA[:5000]))
    assert (part.state, part.persisted_size_bytes) == (State.STATE_RECEIVING, 5000)
    done = await bench.service.write(name, chunk(5000, DATA[5000:], finish=True))
    assert (done.state, done.persisted_size_bytes) == (State.STATE_COMPLETE, len(DATA))
    assert await bench.blobs.read_bytes(await bench.digest(name)) == DATA
    await bench.settled()
    assert await bench.staging.size(done.uid) == 0
    assert await bench.service.get(name) == done


async def test_write_of_an_empty_file_completes(bench: Bench) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"", finish=True))
    assert await bench.digest(name) == hashlib.sha256(b"").hexdigest()


async def test_write_with_a_wrong_checksum_keeps_nothing_of_the_chunk(bench: Bench) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"good"))
    with pytest.raises(InvalidArgument) as caught:
        await bench.service.write(name, chunk(4, b"bad", crc32=0x12345678))
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert f"{zlib.crc32(b'bad'):#010x}" in caught.value.message
    assert "0x12345678" in caught.value.message
    assert (await bench.service.get(name)).persisted_size_bytes == 4


async def test_write_at_a_wrong_offset_names_both_and_keeps_nothing(bench: Bench) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"good"))
    for offset in (0, 3, 5):
        with pytest.raises(InvalidArgument) as caught:
            await bench.service.write(name, chunk(offset, b"more"))
        assert caught.value.reason == Reason.OFFSET_MISMATCH
        assert caught.value.message == f"offset: must be 4, the persisted size of {name}, got {offset}"
    assert (await bench.service.get(name)).persisted_size_bytes == 4


async def test_write_of_too_much_is_refused(bench: Bench) -> None:
    name = await bench.started(size_bytes=6)
    with pytest.raises(InvalidArgument, match=r"must end at 6, the announced size"):
        await bench.service.write(name, chunk(0, b"1234567"))
    with pytest.raises(InvalidArgument, match=f"at most {MAX_CHUNK_BYTES} bytes, got {MAX_CHUNK_BYTES + 1}"):
        await bench.service.write(name, chunk(0, bytes(MAX_CHUNK_BYTES + 1)))
    assert (await bench.service.get(name)).persisted_size_bytes == 0


async def test_write_that_finishes_too_early_is_refused_and_can_go_on(bench: Bench) -> None:
    name = await bench.started(size_bytes=6)
    with pytest.raises(InvalidArgument) as caught:
        await bench.service.write(name, chunk(0, b"1234", finish=True))
    assert caught.value.reason == Reason.UPLOAD_INCOMPLETE
    assert "byte 6, the announced size, got it at byte 4" in caught.value.message
    assert (await bench.service.get(name)).persisted_size_bytes == 0
    done = await bench.service.write(name, chunk(0, b"123456", finish=True))
    assert done.state == State.STATE_COMPLETE


async def test_write_of_a_whole_with_another_sha256_begins_again(bench: Bench) -> None:
    wanted = hashlib.sha256(b"wanted").hexdigest()
    name = await bench.started(sha256=wanted)
    with pytest.raises(InvalidArgument) as caught:
        await bench.service.write(name, chunk(0, b"another", finish=True))
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata["expected"] == wanted
    assert caught.value.metadata["actual"] == hashlib.sha256(b"another").hexdigest()
    again = await bench.service.get(name)
    assert (again.state, again.persisted_size_bytes) == (State.STATE_RECEIVING, 0)
    await bench.service.write(name, chunk(0, b"wanted", finish=True))
    assert await bench.digest(name) == wanted


async def test_write_to_a_complete_upload_is_refused(bench: Bench) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"all", finish=True))
    with pytest.raises(FailedPrecondition, match="is COMPLETE") as caught:
        await bench.service.write(name, chunk(3, b"more"))
    assert caught.value.reason == Reason.WRONG_STATE


async def test_write_by_two_at_once_stores_each_byte_once(bench: Bench) -> None:
    name = await bench.started()
    calls = (bench.service.write(name, chunk(0, b"same")) for _ in range(4))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert (await bench.service.get(name)).persisted_size_bytes == 4


@pytest.mark.parametrize("crash", ["before the blob", "after the blob"])
async def test_get_finishes_what_a_crash_cut_short(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    commit = LocalStaging.commit

    async def crashing(self: LocalStaging, key: str, *, expected_digest: str | None = None) -> Blob:
        if crash == "after the blob":
            await commit(self, key, expected_digest=expected_digest)
        raise ConnectionAbortedError(crash)

    name = await bench.started()
    monkeypatch.setattr(LocalStaging, "commit", crashing)
    with pytest.raises(ConnectionAbortedError):
        await bench.service.write(name, chunk(0, DATA, finish=True))
    monkeypatch.undo()
    successor = bench.successor()
    done = await successor.get(name)
    assert (done.state, done.persisted_size_bytes) == (State.STATE_COMPLETE, len(DATA))
    assert await bench.blobs.read_bytes(await bench.digest(name)) == DATA


async def test_finish_left_clears_away_what_is_staged_of_uploads_that_are_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"some"))
    monkeypatch.setattr(bench.service, "_clear_later", lambda upload: None)
    upload = await bench.service.cancel(name, "")
    assert await bench.staging.size(upload.uid) == 4
    await bench.successor().finish_left()
    assert await bench.staging.size(upload.uid) == 0


async def test_cancel_removes_the_bytes_and_may_be_repeated(bench: Bench) -> None:
    name = await bench.started()
    await bench.service.write(name, chunk(0, b"some"))
    cancelled = await bench.service.cancel(name, '"1"')
    await bench.settled()
    assert await bench.staging.size(cancelled.uid) == 0
    assert await bench.service.cancel(name, "") == cancelled
    with pytest.raises(FailedPrecondition, match="is CANCELLED"):
        await bench.service.write(name, chunk(0, b"some"))


async def test_cancel_of_a_complete_upload_or_with_another_etag_is_refused(bench: Bench) -> None:
    name = await bench.started()
    with pytest.raises(Aborted) as caught:
        await bench.service.cancel(name, '"7"')
    assert caught.value.reason == Reason.ETAG_MISMATCH
    await bench.service.write(name, chunk(0, b"all", finish=True))
    with pytest.raises(FailedPrecondition, match="is COMPLETE"):
        await bench.service.cancel(name, "")


async def test_completed_refuses_an_upload_that_is_not(bench: Bench) -> None:
    name = await bench.started()
    async with bench.database.reading() as connection:
        with pytest.raises(FailedPrecondition, match="must be COMPLETE, it is RECEIVING") as caught:
            await bench.service.completed(connection, name)
        with pytest.raises(NotFound):
            await bench.service.completed(connection, f"{PROJECT}/uploads/nothing")
    assert caught.value.reason == Reason.UPLOAD_INCOMPLETE


@pytest.mark.parametrize(
    ("filename", "size_bytes", "sha256", "field", "problem"),
    [
        ("", 0, "", "upload.filename", "must be the name of the file"),
        ("a/b", 0, "", "upload.filename", "without folders"),
        ("..", 0, "", "upload.filename", "without folders"),
        ("a\nb", 0, "", "upload.filename", "control characters"),
        ("a\x1b[31m", 0, "", "upload.filename", "control characters"),
        ("exe\u202egpj", 0, "", "upload.filename", "control characters"),
        ("x" * 256, 0, "", "upload.filename", "at most 255 bytes, got 256"),
        ("a", -1, "", "upload.size_bytes", f"must be in 0..{LIMIT}, got -1"),
        ("a", LIMIT + 1, "", "upload.size_bytes", f"got {LIMIT + 1}"),
        ("a", 0, "ABC", "upload.sha256", "64 lowercase hex digits, got 'ABC'"),
    ],
)
async def test_start_names_the_field_that_is_not_valid(
    bench: Bench, filename: str, size_bytes: int, sha256: str, field: str, problem: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.start(filename, size_bytes, sha256)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert problem in violation.description


async def test_write_of_a_further_chunk_asks_the_database_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await bench.started()
    turn = bench.service.turn(name)
    await bench.service.write(name, chunk(0, b"one"))
    monkeypatch.setattr(bench.database, "reading", None)
    assert (await bench.service.write(name, chunk(3, b"two"))).persisted_size_bytes == 6
    monkeypatch.undo()
    assert bench.service.turn(name) is turn
    assert (await bench.service.get(name)).persisted_size_bytes == 6


async def test_write_after_a_cancel_in_the_middle_of_a_stream_is_refused(bench: Bench) -> None:
    name = await bench.started()
    turn = bench.service.turn(name)
    await bench.service.write(name, chunk(0, b"one"))
    await bench.service.cancel(name, "")
    with pytest.raises(FailedPrecondition, match="is CANCELLED"):
        await bench.service.write(name, chunk(3, b"two"))
    assert turn.receiving is None
    await bench.settled()
    assert await bench.staged_bytes(name) == 0


async def test_write_goes_on_after_a_chunk_that_was_refused(bench: Bench) -> None:
    name = await bench.started()
    turn = bench.service.turn(name)
    await bench.service.write(name, chunk(0, b"one"))
    with pytest.raises(InvalidArgument):
        await bench.service.write(name, chunk(3, b"bad", crc32=1))
    assert turn.receiving is None
    assert (await bench.service.write(name, chunk(3, b"two", finish=True))).persisted_size_bytes == 6
