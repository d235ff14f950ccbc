"""A disk that is full, or nearly: told by name, and nothing half done stays."""

import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from tests.small_disk import fill, mounted

from luthier.errors import Reason, ResourceExhausted, Unavailable
from luthier.storage import staged_files
from luthier.storage.database import Database
from luthier.storage.disk import MIN_FREE_BYTES, Disk, found_full
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as folder:
        yield folder


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def test_database_on_a_full_disk_says_so_and_goes_on_when_there_is_room(small: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{small}/a.db")
    async with database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (a BLOB)"))
    filler = fill(small)
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match="the disk is full") as caught:
            async with database.transaction() as connection:
                await connection.execute(text("INSERT INTO t VALUES (zeroblob(300000))"))
        assert caught.value.reason == Reason.DISK_FULL
        assert caught.value.retry_after_seconds == 30.0
    assert (await database.rows(text("SELECT count(*) AS n FROM t")))[0]["n"] == 0
    late = Database(f"sqlite+aiosqlite:///{small}/late.db")
    with pytest.raises(ResourceExhausted) as caught:
        async with late.transaction() as connection:
            await connection.execute(text("CREATE TABLE t (a BLOB)"))
    assert caught.value.reason == Reason.DISK_FULL
    filler.unlink()
    async with database.transaction() as connection:
        await connection.execute(text("INSERT INTO t VALUES (zeroblob(300000))"))
    assert (await database.rows(text("SELECT count(*) AS n FROM t")))[0]["n"] == 1
    await database.close()
    await late.close()


async def test_blobs_on_a_full_disk_say_so_and_leave_nothing(small: Path) -> None:
    blobs = LocalBlobStore(small / "blobs")
    staging = LocalStaging(small / "staging", blobs)
    await staging.append("k", 0, b"abc")
    fill(small, leave_bytes=2 * MIB + 4096)
    free_before = Disk(small).free_bytes()
    with pytest.raises(ResourceExhausted) as caught:
        await blobs.put(pieces(*[bytes(MIB)] * 5))
    assert caught.value.reason == Reason.DISK_FULL
    assert Disk(small).free_bytes() == free_before
    with pytest.raises(ResourceExhausted) as caught:
        await staging.append("k", 3, bytes(3 * MIB))
    assert caught.value.reason == Reason.DISK_FULL
    assert await staging.size("k") == 3
    assert Disk(small).free_bytes() >= free_before - 8192
    await staging.append("k", 3, b"def")
    await staging.commit("k")
    assert b"abcdef" in {
        path.read_bytes() for path in (small / "blobs" / "blobs").rglob("*") if path.is_file()
    }
    await staging.discard("k")


async def test_blobs_leave_the_reserve_to_the_database(small: Path) -> None:
    blobs = LocalBlobStore(small / "blobs", min_free_bytes=4 * MIB)
    staging = LocalStaging(small / "staging", blobs, min_free_bytes=4 * MIB)
    with pytest.raises(ResourceExhausted, match=r"4\.0 MiB must stay free") as caught:
        await blobs.put(pieces(*[bytes(MIB)] * 15))
    assert caught.value.reason == Reason.DISK_FULL
    fill(small, leave_bytes=3 * MIB)
    with pytest.raises(ResourceExhausted, match=r"4\.0 MiB must stay free"):
        await staging.append("k", 0, b"x")
    await staging.discard("k")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_write_that_finds_no_room_half_way_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def half(file: Any, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    blobs = LocalBlobStore(tmp_path)
    staging = LocalStaging(tmp_path / "staging", blobs)
    await staging.append("k", 0, b"good")
    monkeypatch.setattr(staged_files, "append", half)
    with pytest.raises(ResourceExhausted, match=os.strerror(code)) as caught:
        await staging.append("k", 4, b"more")
    assert caught.value.reason == Reason.DISK_FULL
    monkeypatch.undo()
    assert await staging.size("k") == 4
    await staging.append("k", 4, b"!")
    blob = await staging.commit("k")
    assert await blobs.read_bytes(blob.digest) == b"good!"


def test_a_floor_refuses_with_both_numbers_and_a_time(tmp_path: Path) -> None:
    assert MIN_FREE_BYTES == 1 << 30
    Disk(tmp_path).require_room()
    Disk(tmp_path, 1).require_room()
    above = Disk(tmp_path, Disk(tmp_path).free_bytes() + (1 << 40))
    assert not above.has_room()
    with pytest.raises(ResourceExhausted, match="must stay free; delete what is not needed") as caught:
        above.require_room()
    assert caught.value.reason == Reason.DISK_FULL
    assert caught.value.metadata["min_free_bytes"] == str(above.min_free_bytes)
    assert caught.value.retry_after_seconds == 30.0


def test_an_error_of_another_kind_is_no_full_disk(tmp_path: Path, small: Path) -> None:
    assert found_full(OSError(errno.EACCES, "no"), tmp_path) is None
    assert found_full(RuntimeError("file write failed"), tmp_path) is None
    assert found_full(OSError(errno.ENOSPC, "no room"), tmp_path) is not None
    fill(small)
    assert found_full(Unavailable("the hub is away"), small) is None
    wrapped = Unavailable("the hub did not deliver")
    wrapped.__cause__ = OSError(errno.ENOSPC, "no room")
    assert found_full(wrapped, tmp_path) is not None
    full = found_full(RuntimeError("file write failed"), small)
    assert full is not None
    assert full.reason == Reason.DISK_FULL
