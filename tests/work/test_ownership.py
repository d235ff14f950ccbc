"""One store of blobs has one owner, and whoever else comes is refused with both named."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest
from sqlalchemy import insert
from tests.stores import database_file, database_url, open_blobs, open_database

from luthier.errors import FailedPrecondition
from luthier.storage import blob_refs
from luthier.storage.blobs import MARK_NAME, BlobStore
from luthier.storage.database import Database
from luthier.storage.identity import database_id
from luthier.storage.migrations import upgrade
from luthier.work.ownership import own_blobs, require_own, require_service
from luthier.work.schema import MIGRATIONS, tasks


class Make(Protocol):
    """Makes a database of its own."""

    async def __call__(self, name: str) -> Database: ...


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def made(name: str) -> Database:
            await asyncio.to_thread(upgrade, database_url(tmp_path / name), (MIGRATIONS,))
            database = open_database(tmp_path / name)
            stack.push_async_callback(database.close)
            return database

        yield made


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return open_blobs(tmp_path / "blobs")


def mark(blobs: BlobStore) -> Path:
    """The file that says whose they are."""
    return Path(blobs.place) / MARK_NAME


def copy_database(path: Path, to: Path) -> None:
    shutil.copy(database_file(path), database_file(to))


async def id_of(database: Database) -> str:
    async with database.reading() as connection:
        return await database_id(connection)


async def test_two_services_do_not_share_a_store(make: Make, blobs: BlobStore) -> None:
    data, training = await make("data"), await make("training")
    await own_blobs(data, blobs, "data", is_beside=False)
    await own_blobs(data, blobs, "data", is_beside=False)
    with pytest.raises(FailedPrecondition) as caught:
        await own_blobs(training, blobs, "training", is_beside=False)
    text = caught.value.message
    assert f"are those of the data service with database {await id_of(data)}" in text
    assert f"this is the training service with database {await id_of(training)}" in text
    assert "LUTHIER_TRAINING_BLOBS_URL" in text
    with pytest.raises(FailedPrecondition, match="the data service with database"):
        await require_own(training, blobs, "training")


async def test_of_two_who_start_at_once_one_gets_the_store(make: Make, blobs: BlobStore) -> None:
    databases = [await make(f"d{number}") for number in range(6)]
    starts = (own_blobs(database, blobs, "data", is_beside=False) for database in databases)
    ends = await asyncio.gather(*starts, return_exceptions=True)
    assert sum(end is None for end in ends) == 1
    assert sum(isinstance(end, FailedPrecondition) for end in ends) == 5


async def test_anothers_store_is_refused_without_a_database(make: Make, blobs: BlobStore) -> None:
    await require_service(blobs, "training")
    await own_blobs(await make("data"), blobs, "data", is_beside=False)
    await require_service(blobs, "data")
    with pytest.raises(
        FailedPrecondition, match=r"are those of the data service .*LUTHIER_TRAINING_BLOBS_URL"
    ):
        await require_service(blobs, "training")


async def test_a_new_database_does_not_take_the_blobs_of_one_that_is_gone_until_it_is_told(
    make: Make, blobs: BlobStore
) -> None:
    await own_blobs(await make("old"), blobs, "data", is_beside=False)
    new = await make("new")
    with pytest.raises(FailedPrecondition) as caught:
        await own_blobs(new, blobs, "data", is_beside=False)
    right = f"write `data {await id_of(new)}` to {mark(blobs)}"
    assert caught.value.message.endswith(f"or, if it is gone for good, {right}")
    mark(blobs).write_text(f"data {await id_of(new)}")
    await own_blobs(new, blobs, "data", is_beside=False)


async def test_a_database_and_its_blobs_know_each_other_wherever_both_are_restored(
    make: Make, blobs: BlobStore, tmp_path: Path
) -> None:
    database = await make("here")
    await own_blobs(database, blobs, "data", is_beside=False)
    await database.close()
    copy_database(tmp_path / "here", tmp_path / "there")
    theirs = open_blobs(tmp_path / "theirs")
    shutil.copytree(blobs.place, theirs.place, dirs_exist_ok=True)
    await own_blobs(await make("there"), theirs, "data", is_beside=False)


async def test_a_backup_of_before_there_were_ids_takes_marked_blobs_by_hand_and_shuts_the_former_owner_out(
    make: Make, blobs: BlobStore, tmp_path: Path
) -> None:
    """It knows blobs of that store, and so may any other database with a model of the same bytes."""
    former = tmp_path / "former"
    shutil.copytree(
        MIGRATIONS, former, ignore=shutil.ignore_patterns("work_0015*", "work_0016*", "__pycache__")
    )
    await asyncio.to_thread(upgrade, database_url(tmp_path / "live"), (former,))
    blob = await blobs.put_bytes(b"a model that others have too")
    before = open_database(tmp_path / "live")
    async with before.transaction() as connection:
        await blob_refs.refer(connection, "uid", [blob.digest])
    await before.close()
    copy_database(tmp_path / "live", tmp_path / "backup")
    live = await make("live")
    await own_blobs(live, blobs, "data", is_beside=True)
    backup = await make("backup")
    assert await id_of(live) != await id_of(backup)
    with pytest.raises(FailedPrecondition) as caught:
        await own_blobs(backup, blobs, "data", is_beside=True)
    text = caught.value.message
    assert f"are those of the data service with database {await id_of(live)}" in text
    assert text.endswith(f"write `data {await id_of(backup)}` to {mark(blobs)}")
    mark(blobs).write_text(f"data {await id_of(backup)}")
    await own_blobs(backup, blobs, "data", is_beside=True)
    with pytest.raises(FailedPrecondition, match=f"with database {await id_of(backup)}, this is"):
        await own_blobs(live, blobs, "data", is_beside=True)


@pytest.mark.parametrize("known", ["needed", "loose"])
async def test_blobs_of_before_there_were_marks_become_the_service_s_that_knows_some(
    make: Make, blobs: BlobStore, known: str
) -> None:
    for number in range(3):
        await blobs.put_bytes(b"of a crash %d" % number)
    blob = await blobs.put_bytes(b"needed once")
    database = await make("data")
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "uid", [blob.digest])
    if known == "loose":
        async with database.transaction() as connection:
            await blob_refs.drop(connection, "uid")
    await own_blobs(database, blobs, "data", is_beside=False)
    owner = await blobs.owner()
    assert owner is not None
    assert owner.database_id == await id_of(database)


async def test_blobs_of_nobody_are_not_taken_by_a_database_that_knows_none(
    make: Make, blobs: BlobStore
) -> None:
    digests = [(await blobs.put_bytes(b"of another %d" % number)).digest for number in range(3)]
    database = await make("data")
    tomorrow_us = round((time.time() + 86_400) * 1e6)
    async with database.transaction() as connection:
        await blob_refs.note_strays(connection, digests, tomorrow_us)
    with pytest.raises(FailedPrecondition, match="are nobody's so far, and the data service") as caught:
        await own_blobs(database, blobs, "data", is_beside=False)
    assert f"write `data {await id_of(database)}` to {mark(blobs)}" in caught.value.message
    assert await blobs.owner() is None


async def test_beside_a_database_that_has_had_work_blobs_that_it_does_not_need_are_its_own(
    make: Make, blobs: BlobStore
) -> None:
    """As former versions left them; a database that never had work may be there in place of a lost one."""
    await blobs.put_bytes(b"an answer of former times")
    database = await make("evaluation")
    with pytest.raises(FailedPrecondition, match="are nobody's so far"):
        await own_blobs(database, blobs, "evaluation", is_beside=True)
    texts = ("task_id", "kind", "uid", "subject", "project", "state", "worker")
    numbers = ("epoch", "attempt", "last_local_number", "queued_at_us")
    row = {
        **dict.fromkeys(texts, "x"),
        **dict.fromkeys(numbers, 1),
        "resources": [],
        "cancel_requested": False,
    }
    async with database.transaction() as connection:
        await connection.execute(insert(tasks).values(row))
    with pytest.raises(FailedPrecondition, match="are nobody's so far"):
        await own_blobs(database, blobs, "evaluation", is_beside=False)
    await own_blobs(database, blobs, "evaluation", is_beside=True)
    assert await blobs.owner() is not None


@pytest.mark.parametrize("text", ["", "data", "data x", "../a 0", "data " + "0" * 33, "\0" * 41])
async def test_what_is_no_mark_is_refused_by_name(make: Make, blobs: BlobStore, text: str) -> None:
    mark(blobs).write_text(text)
    with pytest.raises(FailedPrecondition, match=f"{mark(blobs)} must say whose blobs"):
        await own_blobs(await make("data"), blobs, "data", is_beside=False)
