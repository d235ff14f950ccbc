"""Holds: who needs a resource, in its own service and in others."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from sqlalchemy import select
from tests.work.keepers import MemoryKeeper

from luthier.data.datasets.repository import datasets
from luthier.data.schema import MIGRATIONS
from luthier.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied, Reason, Unavailable
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.storage.stored import Stored
from luthier.stored.v1.data_pb2 import DatasetPrivate
from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.reference_pb2 import Reference
from luthier.work import elsewhere, schema
from luthier.work.elsewhere import KEPT_SECONDS, RENEW_SECONDS, TAKEN_SECONDS, Elsewhere, GrpcKeeper, Hold
from luthier.work.families import delete_free
from luthier.work.holds import GRACE_SECONDS, Holds
from luthier.work.host import Hosted, Parts, ServiceSettings, hosting
from luthier.work.peers import bearer, error_of
from luthier.work.schema import held_elsewhere
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

RENDERING = Reference(name="projects/p/renderings/r", uid="uid of r")
JOB = "projects/p/fineTuningJobs/j"
StoredDataset = Stored[Dataset, DatasetPrivate]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'data.db'}"
    upgrade(url, (schema.MIGRATIONS, MIGRATIONS))
    made = Database(url)
    yield made
    await made.close()


async def dataset(database: Database, name: str) -> StoredDataset:
    async with database.transaction() as connection:
        message = Dataset(name=f"projects/p/datasets/{name}")
        return await datasets().insert(connection, message, DatasetPrivate())


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
        await delete_free(connection, datasets(), holder)
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


async def needing(database: Database, kept: Elsewhere) -> StoredDataset:
    """Store a resource that needs a rendering of another service."""
    holder = await dataset(database, "holder")
    async with (
        kept.holding(JOB, [RENDERING, RENDERING]) as holds,
        database.transaction() as connection,
    ):
        await elsewhere.record(connection, holds, holder)
    return holder


async def rows(database: Database) -> list[bool]:
    async with database.reading() as connection:
        return [row.released for row in await connection.execute(select(held_elsewhere))]


async def test_a_need_is_held_for_a_while_then_for_longer_and_released_when_it_is_over(
    database: Database,
) -> None:
    keeper, clock = MemoryKeeper(), Clock()
    kept = Elsewhere(database, {"renderings": keeper}, clock)
    holder = await needing(database, kept)
    assert keeper.holders() == [(RENDERING.name, JOB)]
    assert [seconds for _, seconds in keeper.kept.values()] == [TAKEN_SECONDS]
    await kept.sweep()
    assert [seconds for _, seconds in keeper.kept.values()] == [KEPT_SECONDS]
    calls = keeper.num_calls
    clock.now += RENEW_SECONDS - 1
    await kept.sweep()
    assert keeper.num_calls == calls, "renewed lately"
    clock.now += 1
    await kept.sweep()
    assert keeper.num_calls == calls + 1
    async with database.transaction() as connection:
        await elsewhere.release_all(connection, holder.uid)
    await kept.sweep()
    assert (keeper.holders(), await rows(database)) == ([], [])


async def test_what_could_not_be_stored_is_let_go_by_the_next_sweep(database: Database) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    with pytest.raises(RuntimeError):
        async with kept.holding(JOB, [RENDERING]):
            raise RuntimeError
    assert keeper.holders() == [(RENDERING.name, JOB)], "no peer is called where a transaction may write"
    await kept.sweep()
    assert (keeper.holders(), await rows(database)) == ([], [])
    keeper.away = Unavailable("away")
    with pytest.raises(Unavailable):
        async with kept.holding(JOB, [RENDERING]):
            raise AssertionError("it is not held")


async def test_what_was_rolled_back_after_its_block_is_let_go_a_little_later(database: Database) -> None:
    keeper, clock = MemoryKeeper(), Clock()
    kept = Elsewhere(database, {"renderings": keeper}, clock)
    async with kept.holding(JOB, [RENDERING]):
        pass
    await kept.sweep()
    assert keeper.holders() == [(RENDERING.name, JOB)], "the commit may be under way"
    clock.now += 61.0
    await kept.sweep()
    assert keeper.holders() == []


async def test_a_call_whose_answer_is_lost_leaves_no_hold(database: Database) -> None:
    keeper = MemoryKeeper(loses_answers=True)
    kept = Elsewhere(database, {"renderings": keeper})
    with pytest.raises(Unavailable):
        async with kept.holding(JOB, [RENDERING]):
            raise AssertionError("nobody knows that it is held")
    keeper.loses_answers = False
    await kept.sweep()
    assert keeper.holders() == []


async def test_no_peer_is_called_while_a_transaction_writes(database: Database) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    async with database.transaction():
        with pytest.raises(AssertionError, match="before the transaction"):
            async with kept.holding(JOB, [RENDERING]):
                raise AssertionError("it is not taken")
    assert keeper.num_calls == 0


async def test_a_failing_creation_calls_no_peer_inside_its_unit_of_work(database: Database) -> None:
    """As the server runs a Create: all in one unit, which the failing transaction has begun."""
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    await dataset(database, "there")
    with pytest.raises(AlreadyExists):
        async with database.unit_of_work(), kept.holding(JOB, [RENDERING]):
            await dataset(database, "there")
    assert keeper.num_calls == 1, "taken, and not released while nobody else could write"


async def test_a_peer_that_is_away_keeps_no_other_from_being_looked_after(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    away, near, clock = MemoryKeeper(), MemoryKeeper(), Clock()
    kept = Elsewhere(database, {"renderings": away, "models": near}, clock)
    holder = await dataset(database, "holder")
    needed = [Reference(name=f"projects/p/renderings/r{number}", uid=f"r{number}") for number in range(50)]
    async with (
        kept.holding(JOB, [*needed, Reference(name="projects/p/models/m", uid="m")]) as holds,
        database.transaction() as connection,
    ):
        await elsewhere.record(connection, holds, holder)
    async with database.transaction() as connection:
        await elsewhere.release_all(connection, holder.uid)
    away.away, calls = Unavailable("away"), away.num_calls
    await kept.sweep()
    await kept.sweep()
    assert near.holders() == []
    assert away.num_calls == calls + 1, "one try a while for all that wait for a peer"
    assert caplog.text.count("holds wait for a peer") == 1
    away.away = None
    clock.now += 60.0
    await kept.sweep()
    assert (away.holders(), await rows(database)) == ([], [])


async def test_a_need_of_before_uids_is_of_what_was_held_first(database: Database) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    holder = await dataset(database, "holder")
    async with database.transaction() as connection:
        old = Hold(hold="h", name=RENDERING.name, uid="", holder=JOB)
        await elsewhere.record(connection, [old], holder)
    await kept.sweep()
    async with database.reading() as connection:
        assert [row.uid for row in await connection.execute(select(held_elsewhere))] == [
            f"uid of {RENDERING.name}"
        ]


async def test_a_peer_that_is_away_makes_everything_later_and_loses_nothing(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    holder = await needing(database, kept)
    keeper.away = Unavailable("away")
    await kept.sweep()
    assert "holds wait for a peer" in caplog.text
    async with database.transaction() as connection:
        await elsewhere.release_all(connection, holder.uid)
    await kept.sweep()
    assert await rows(database) == [True]
    keeper.away = None
    # A service that starts anew knows from its rows what is to be released.
    await Elsewhere(database, {"renderings": keeper}).sweep()
    assert (keeper.holders(), await rows(database)) == ([], [])


async def test_what_is_gone_though_it_is_needed_is_said_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    await needing(database, kept)
    keeper.away = NotFound("no such rendering")
    await kept.sweep()
    await kept.sweep()
    assert caplog.text.count("what is needed is gone") == 1


@pytest.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[tuple[Parts, int]]:
    """A service with datasets that others may hold, and its port."""
    kept: list[Parts] = []

    def build(parts: Parts) -> Hosted:
        kept.append(parts)
        return Hosted(registrations=[], handlers={}, policy={}, families={"datasets": datasets()})

    plan = ServiceSettings(
        name="data",
        home=tmp_path,
        address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
        projects=("p",),
        migrations=MIGRATIONS,
        kinds=(),
        min_free_bytes=0,
    )
    async with hosting(plan, build) as port:
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
                await delete_free(connection, datasets(), held)
        await keeper.release(hold)
        await keeper.release(hold)
        async with parts.database.transaction() as connection:
            await delete_free(connection, datasets(), held)
        with pytest.raises(NotFound):
            await keeper.keep(hold, 60.0)


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
        ({"seconds": 1e9}, "seconds"),
    ],
)
async def test_a_field_of_a_hold_that_is_not_valid_is_named(
    hosted: tuple[Parts, int], changes: dict[str, Any], field: str
) -> None:
    parts, port = hosted
    held = await dataset(parts.database, "held")
    wanted: dict[str, Any] = {"name": held.message.name, "uid": held.uid, "holder": JOB, "seconds": 60.0}
    wanted |= {"hold": str(uuid.uuid4()), **changes}
    token = parts.task_tokens.mint("p", (held.message.name,), 0, elsewhere.HOLDER, 60.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = hold_service_pb2_grpc.HoldServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CreateHold(
                hold_service_pb2.CreateHoldRequest(**wanted), metadata=bearer(token), timeout=10
            )
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
    assert "only another service may hold a resource" in error.message
