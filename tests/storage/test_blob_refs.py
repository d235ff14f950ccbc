"""Rows that keep blobs: who refers to what, and what is loose once nobody does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from sqlalchemy import select
from tests.stores import open_database

from luthier.storage import blob_refs
from luthier.storage.blob_refs import digests_in
from luthier.storage.database import Database
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate, RenderingPrivate
from luthier.stored.v1.training_pb2 import CheckpointPrivate
from luthier.worker.v1.task_pb2 import BlobFile, Shard

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = open_database(tmp_path / "test")
    async with database.transaction() as connection:
        await connection.run_sync(blob_refs.metadata.create_all)
    yield database
    await database.close()


async def kept(database: Database) -> set[tuple[str, str]]:
    table = blob_refs.blob_refs
    return {(row["owner"], row["digest"]) for row in await database.rows(select(table))}


async def loose(database: Database) -> set[str]:
    return {row["digest"] for row in await database.rows(select(blob_refs.loose_blobs))}


async def test_an_owner_refers_once_to_each(database: Database) -> None:
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "u", [A, A, B])
        await blob_refs.refer(connection, "u", [B])
        await blob_refs.refer(connection, "u", [])
        assert await blob_refs.referred(connection, "u", [A, B, A])
        assert not await blob_refs.referred(connection, "u", [A, C])
        assert await blob_refs.needed(connection, [A, C]) == {A}
    assert await kept(database) == {("u", A), ("u", B)}


async def test_what_the_last_owner_lets_go_is_loose_from_then_on(database: Database) -> None:
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "u", [A, B])
        await blob_refs.refer(connection, "v", [B])
        await blob_refs.drop(connection, "u")
    assert await kept(database) == {("v", B)}
    assert await loose(database) == {A}, "somebody needs the other one"
    async with database.transaction() as connection:
        since = await blob_refs.loose_since(connection, [A, B])
        assert abs(since[A] / 1e6 - time.time()) < 60
        first, one = blob_refs.FIRST_LOOSE, blob_refs.Loose(digest=A, since_us=since[A])
        assert list(await blob_refs.loose_before(connection, since[A], first, 10)) == [one]
        assert list(await blob_refs.loose_before(connection, since[A], one, 10)) == [], "it is past"
        assert list(await blob_refs.loose_before(connection, since[A] - 1, first, 10)) == []
        await blob_refs.forget_loose(connection, [A])
    assert await loose(database) == set()


async def test_a_stray_keeps_the_time_that_it_was_given_first(database: Database) -> None:
    async with database.transaction() as connection:
        await blob_refs.note_strays(connection, [A, B], 10)
        await blob_refs.note_strays(connection, [B, C], 20)
        assert await blob_refs.loose_since(connection, [A, B, C]) == {A: 10, B: 10, C: 20}
        loose_10 = [blob_refs.Loose(digest=digest, since_us=10) for digest in (A, B)]
        assert list(await blob_refs.loose_before(connection, 19, blob_refs.FIRST_LOOSE, 10)) == loose_10


async def test_an_owner_changes_what_it_refers_to(database: Database) -> None:
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "u", [A, B])
        await blob_refs.refer_instead(connection, "u", {A, B}, {B, C})
    assert await kept(database) == {("u", B), ("u", C)}
    assert await loose(database) == {A}


async def test_a_part_of_what_an_owner_refers_to_is_let_go(database: Database) -> None:
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "u", [A, B])
        await blob_refs.drop_some(connection, "u", [B, C])
    assert (await kept(database), await loose(database)) == ({("u", A)}, {B})


async def test_a_resource_goes_with_its_parts_and_nobody_elses(database: Database) -> None:
    async with database.transaction() as connection:
        for owner in ("u", "u/checkpoints/1", "u/rollouts/7", "u2", "u0/a", "t"):
            await blob_refs.refer(connection, owner, [A])
        await blob_refs.drop_whole(connection, "u")
    assert await kept(database) == {("u2", A), ("u0/a", A), ("t", A)}


async def test_more_than_one_statement_takes_is_let_go_at_once(database: Database) -> None:
    many = [f"{number:064x}" for number in range(1200)]
    async with database.transaction() as connection:
        await blob_refs.refer(connection, "u", many)
        assert await blob_refs.referred(connection, "u", many)
        await blob_refs.drop_some(connection, "u", many[:1100])
        await blob_refs.drop(connection, *(f"{number}" for number in range(2000)))
    assert len(await kept(database)) == 100
    assert await loose(database) == set(many[:1100])


def test_every_file_that_a_message_names_is_found_however_deep() -> None:
    shard = Shard(file=BlobFile(path="r", sha256=B))
    assert list(digests_in(RenderingPrivate(model_digest=C, tokenizer_sha256=A, shards=[shard]))) == [B, A]
    version = DatasetVersionPrivate(source_files=[BlobFile(path="s", sha256=A)], shards=[shard, shard])
    assert sorted(digests_in(version)) == [A, B, B]
    assert list(digests_in(CheckpointPrivate())) == []
