"""Holds: who needs a resource, in its own service and in others."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from sqlalchemy import select
from tests.stores import service_urls
from tests.work.keepers import dataset

from luthier.data.datasets.repository import datasets
from luthier.data.schema import MIGRATIONS
from luthier.errors import FailedPrecondition, NotFound, PermissionDenied, Reason
from luthier.runtime.auth import HOLDER
from luthier.storage.database import Database
from luthier.storage.opening import open_stores
from luthier.work import schema
from luthier.work.elsewhere import GrpcKeeper, Hold
from luthier.work.holds import GRACE_SECONDS, Holds
from luthier.work.host import Hosted, Parts, ServiceSettings, hosting
from luthier.work.keeping import DELETED_KEEP_SECONDS, Keeping
from luthier.work.peers import bearer, error_of
from luthier.work.undeleting import delete_free
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

JOB = "projects/p/fineTuningJobs/j"
WEEK = 7 * 24 * 3600.0


async def test_what_a_resource_needs_until_it_ends_is_free_then_and_what_it_needs_always_is_not(
    database: Database,
) -> None:
    holds, read, parent = Holds(), await dataset(database, "read"), await dataset(database, "parent")
    holder = await dataset(database, "holder")
    async with database.transaction() as connection:
        await holds.add(connection, [read.uid, read.uid], holder)
        await holds.add(connection, [parent.uid], holder, lasting=True)
        for needed in (read, parent):
            with pytest.raises(
                FailedPrecondition, match=r"is needed by projects/p/datasets/holder"
            ) as caught:
                await holds.require_free(connection, needed)
            assert caught.value.reason == Reason.RESOURCE_IN_USE
            assert caught.value.metadata["holder"] == "projects/p/datasets/holder"
        await holds.end(connection, holder.uid)
        await holds.require_free(connection, read)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, parent)
        await delete_free(connection, datasets(), holder, DELETED_KEEP_SECONDS)
        await holds.require_free(connection, parent)


async def test_many_holders_are_counted(database: Database) -> None:
    holds, held = Holds(), await dataset(database, "held")
    async with database.transaction() as connection:
        for number in range(5):
            await holds.set(connection, held.uid, str(uuid.uuid4()), f"jobs/{number}", 60.0)
        with pytest.raises(FailedPrecondition, match=r"by jobs/0, jobs/1, jobs/2 and 2 more, until"):
            await holds.require_free(connection, held)


async def test_a_hold_of_another_service_ends_with_its_time(database: Database) -> None:
    now = 5_000
    holds, held = Holds(lambda: now), await dataset(database, "held")
    async with database.transaction() as connection:
        await holds.set(connection, held.uid, "h", "jobs/a", 0.001)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, held)
        now = 6_000
        await holds.require_free(connection, held)
        await holds.set(connection, held.uid, "h", "jobs/a", 0.001)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, held)
        now = 7_000
        await holds.forget_expired(connection)
        assert list(await connection.execute(select(schema.holds))) == []


async def test_a_hold_lasts_a_while_after_its_keeper_was_away(database: Database) -> None:
    now = 0
    holds, held = Holds(lambda: now), await dataset(database, "held")
    async with database.transaction() as connection:
        await holds.set(connection, held.uid, "h", "jobs/a", 60.0)
        now = 25 * 3600 * 1_000_000
        await holds.excuse(connection)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, held)
        now += round(GRACE_SECONDS * 1e6)
        await holds.require_free(connection, held)


async def test_a_lasting_need_is_no_shorter_for_one_that_ends(database: Database) -> None:
    holds, held, holder = Holds(), await dataset(database, "held"), await dataset(database, "holder")
    async with database.transaction() as connection:
        for lasting in (False, True, False):
            await holds.add(connection, [held.uid], holder, lasting=lasting)
        await holds.end(connection, holder.uid)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, held)
        await holds.release(connection, holder.uid)
        with pytest.raises(FailedPrecondition):
            await holds.require_free(connection, held)


@pytest.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[tuple[Parts, int]]:
    """A service with datasets that others may hold, and its port."""
    async with served(tmp_path, "p") as there:
        yield there


@asynccontextmanager
async def served(home: Path, project: str) -> AsyncIterator[tuple[Parts, int]]:
    kept: list[Parts] = []

    def build(parts: Parts) -> Hosted:
        kept.append(parts)
        return Hosted(registrations=[], handlers={}, policy={}, families={"datasets": datasets()})

    plan = ServiceSettings(
        name="data",
        home=home,
        address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
        projects=(project,),
        migrations=MIGRATIONS,
        kinds=(),
        keeping=Keeping(),
        min_free_bytes=0,
        **service_urls(home, "data"),
    )
    async with hosting(plan, build, open_stores) as port:
        yield kept[0], port


async def test_another_service_holds_and_releases_over_the_wire(hosted: tuple[Parts, int]) -> None:
    parts, port = hosted
    held = await dataset(parts.database, "held")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        keeper = GrpcKeeper(channel, parts.task_tokens, "the Data service")
        hold = Hold(hold=str(uuid.uuid4()), name=held.message.name, uid=held.uid, holder=JOB)
        await keeper.keep(hold, 60.0)
        async with parts.database.transaction() as connection:
            with pytest.raises(FailedPrecondition, match=JOB):
                await delete_free(connection, datasets(), held, DELETED_KEEP_SECONDS)
        await keeper.release(hold)
        await keeper.release(hold)
        async with parts.database.transaction() as connection:
            await delete_free(connection, datasets(), held, DELETED_KEEP_SECONDS)
        with pytest.raises(NotFound):
            await keeper.keep(hold, 60.0)


async def test_holds_are_prolonged_and_released_when_their_project_is_not_served_any_more(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, "p") as (parts, port):
        held = await dataset(parts.database, "held")
    hold = Hold(hold=str(uuid.uuid4()), name=held.message.name, uid=held.uid, holder=JOB)
    async with (
        served(tmp_path, "other") as (parts, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        keeper = GrpcKeeper(channel, parts.task_tokens, "the Data service")
        assert await keeper.keep(hold, 60.0) == held.uid
        async with parts.database.transaction() as connection:
            with pytest.raises(FailedPrecondition, match=JOB):
                await delete_free(connection, datasets(), held, DELETED_KEEP_SECONDS)
        await keeper.release(hold)
        async with parts.database.transaction() as connection:
            await delete_free(connection, datasets(), held, DELETED_KEEP_SECONDS)


async def test_a_name_used_again_is_not_what_was_seen_and_one_of_before_uids_is_whatever_has_it(
    hosted: tuple[Parts, int],
) -> None:
    parts, port = hosted
    held = await dataset(parts.database, "held")
    name = held.message.name
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        keeper = GrpcKeeper(channel, parts.task_tokens, "the Data service")
        with pytest.raises(NotFound, match="does not exist"):
            await keeper.keep(
                Hold(hold=str(uuid.uuid4()), name=name, uid=str(uuid.uuid4()), holder=JOB), 60.0
            )
        await keeper.keep(Hold(hold=str(uuid.uuid4()), name=name, uid="", holder=JOB), 60.0)
        for unknown in ("projects/p/models/m", "projects/p/nothing/m"):
            with pytest.raises(NotFound):
                await keeper.keep(Hold(hold=str(uuid.uuid4()), name=unknown, uid="", holder=JOB), 60.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hold": "x"}, "hold"),
        ({"hold": ""}, "hold"),
        ({"uid": "x"}, "uid"),
        ({"holder": "x" * 1001}, "holder"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": math.nextafter(WEEK, math.inf)}, "seconds"),
        ({"seconds": 1e9}, "seconds"),
        ({"seconds": WEEK}, ""),
        ({"seconds": 1e-6}, ""),
        ({"holder": "x" * 1000}, ""),
    ],
)
async def test_a_field_of_a_hold_that_is_not_valid_is_named_and_what_is_just_valid_is_taken(
    hosted: tuple[Parts, int], changes: dict[str, Any], field: str
) -> None:
    parts, port = hosted
    held = await dataset(parts.database, "held")
    wanted: dict[str, Any] = {"name": held.message.name, "uid": held.uid, "holder": JOB, "seconds": 60.0}
    wanted |= {"hold": str(uuid.uuid4()), **changes}
    token = parts.task_tokens.mint("p", (held.message.name,), 0, HOLDER, 60.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = hold_service_pb2_grpc.HoldServiceStub(channel)
        making = stub.CreateHold(
            hold_service_pb2.CreateHoldRequest(**wanted), metadata=bearer(token), timeout=10
        )
        if not field:
            assert (await making).uid == held.uid
            return
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await making
    error = error_of(caught.value)
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith(f"{field}: must ")


async def test_a_workers_token_holds_and_releases_nothing(hosted: tuple[Parts, int]) -> None:
    parts, port = hosted
    held = await dataset(parts.database, "held")
    token = parts.task_tokens.mint("p", (held.message.name,), 1, "4f0c", 60.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = hold_service_pb2_grpc.HoldServiceStub(channel)
        release = hold_service_pb2.ReleaseHoldRequest(name=held.message.name, hold=str(uuid.uuid4()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ReleaseHold(release, metadata=bearer(token), timeout=10)
    error = error_of(caught.value)
    assert isinstance(error, PermissionDenied)
    assert "only another service may" in error.message
