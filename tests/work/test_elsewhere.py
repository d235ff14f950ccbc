"""What is needed at other services: taken, prolonged and let go, whatever happens in between."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import select
from tests.work.keepers import MemoryKeeper, StoredDataset, dataset

from luthier.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LuthierError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from luthier.storage.database import Database
from luthier.v1.reference_pb2 import Reference
from luthier.work import elsewhere
from luthier.work.elsewhere import KEPT_SECONDS, RENEW_SECONDS, TAKEN_SECONDS, Elsewhere, Hold
from luthier.work.schema import held_elsewhere

RENDERING = Reference(name="projects/p/renderings/r", uid="uid of r")
JOB = "projects/p/fineTuningJobs/j"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def needing(database: Database, kept: Elsewhere) -> StoredDataset:
    """Store a resource that needs a rendering of another service."""
    holder = await dataset(database, "holder")
    async with (
        kept.holding(JOB, [RENDERING, RENDERING]) as holds,
        database.transaction() as connection,
    ):
        await elsewhere.record(connection, holds, holder)
    return holder


async def needing_one(database: Database, kept: Elsewhere) -> None:
    """Store one more resource that needs it."""
    holder = await dataset(database, f"holder-{uuid.uuid4()}")
    async with kept.holding(JOB, [RENDERING]) as holds, database.transaction() as connection:
        await elsewhere.record(connection, holds, holder)


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


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded("slow"), ResourceExhausted("full")])
async def test_a_peer_that_cannot_now_is_away(
    database: Database, caplog: pytest.LogCaptureFixture, error: LuthierError
) -> None:
    keeper, clock = MemoryKeeper(), Clock()
    kept = Elsewhere(database, {"renderings": keeper}, clock)
    for _ in range(2):
        await needing_one(database, kept)
    keeper.away, calls = error, keeper.num_calls
    await kept.sweep()
    assert keeper.num_calls == calls + 1, "none of the others is tried while it is away"
    assert "holds wait for a peer" in caplog.text


@pytest.mark.parametrize(
    "error", [InvalidArgument("no hold"), Internal("broken"), Unimplemented("no such method")]
)
async def test_what_a_peer_refuses_is_named_and_keeps_no_other_hold_from_being_looked_after(
    database: Database, caplog: pytest.LogCaptureFixture, error: LuthierError
) -> None:
    keeper, clock = MemoryKeeper(), Clock()
    kept = Elsewhere(database, {"renderings": keeper}, clock)
    for _ in range(3):
        await needing_one(database, kept)
    keeper.away, calls = error, keeper.num_calls
    await kept.sweep()
    await kept.sweep()
    assert keeper.num_calls == calls + 6, "each is asked for, in every round"
    assert "holds wait for a peer" not in caplog.text
    refused = [one for one in caplog.records if one.getMessage().startswith("a peer refuses a hold")]
    assert len(refused) == 3, "said once for each hold"
    assert {(vars(one)["held"], vars(one)["holder"]) for one in refused} == {(RENDERING.name, JOB)}
    assert vars(refused[0])["detail"] == f"{error.code} {error.reason}: {error.message}"
    keeper.away = None
    await kept.sweep()
    assert [seconds for _, seconds in keeper.kept.values()] == [KEPT_SECONDS] * 3, "mended, it is kept"


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


async def test_what_nobody_keeps_is_said_and_keeps_no_other_from_being_looked_after(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = MemoryKeeper()
    kept = Elsewhere(database, {"renderings": keeper})
    holder = await needing(database, kept)
    async with database.transaction() as connection:
        unknown = Hold(hold="0", name="projects/p/nothing/n", uid="u", holder=JOB)
        await elsewhere.record(connection, [unknown], holder)
        await elsewhere.release_all(connection, holder.uid)
    await kept.sweep()
    assert keeper.holders() == []
    assert f"no service is known that keeps projects/p/nothing/n for {JOB}" in caplog.text
