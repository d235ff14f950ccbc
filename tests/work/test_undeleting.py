"""What is deleted comes back as it was, until it is purged; what it needs stays as long as it may come back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Column, Table, Text, func, insert, select
from tests.work.things import METADATA, NAME, PARENT, State, Thing, Things, things_in

from luthier.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, Reason
from luthier.runtime.paging import PageTokens
from luthier.storage.deleted import GIVEN_UP_US
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import ListEvaluationsRequest
from luthier.work.events import line
from luthier.work.holds import Holds
from luthier.work.keeping import DELETED_KEEP_SECONDS
from luthier.work.purging import PURGE_BATCH, RESOURCES_AT_ONCE, Purged, PurgeMetrics, Purging
from luthier.work.schema import events, holds, tasks
from luthier.work.tasks import Outcome

PARTS = Table("thing_parts", METADATA, Column("owner", Text), Column("number", Text, primary_key=True))
DAY = 86_400.0


class Clock:
    """A wall clock that is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.seconds


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


def purging(things: Things, clock: Clock | None = None) -> Purging:
    family = Purged(rows=things.rows, parts=[PARTS.c.owner])
    metrics = PurgeMetrics(CollectorRegistry())
    return Purging(
        things.database, things.family._log, [family], metrics, DELETED_KEEP_SECONDS, clock or Clock()
    )


async def ended(things: Things, name: str = NAME, **fields: Any) -> Thing:
    """A thing that has ended, with its task and its events."""
    await things.add(name, **fields)
    task = await things.claim()
    assert task is not None
    await things.cancel(name)
    await things.finish(task, Outcome(cancelled=True))
    return await things.read(name)


def timeless(thing: Thing) -> Evaluation:
    """A thing less what each change of it changes."""
    message = thing.copy()
    message.ClearField("etag")
    message.ClearField("update_time")
    return message


async def hold(things: Things, held: Thing, holder: Thing) -> None:
    async with things.database.transaction() as connection:
        await Holds().add(connection, [held.uid], holder, lasting=True)


async def count(things: Things, column: Any, uid: str) -> int:
    statement = select(func.count()).where(column == uid)
    async with things.database.reading() as connection:
        return int((await connection.execute(statement)).scalar_one())


async def listed(things: Things, **asked: Any) -> list[tuple[str, bool]]:
    tokens, found, token = PageTokens(b"k" * 32), [], ""
    while True:
        request = ListEvaluationsRequest(parent=PARENT, page_token=token, **asked)
        page, token = await things.family.page(request, tokens)
        found += [(one.name.rpartition("/")[2], one.HasField("delete_time")) for one in page]
        if not token:
            return found


async def test_a_deleted_resource_says_until_when_and_comes_back_as_it_was(things: Things) -> None:
    made = await ended(things, display_name="mine", labels={"team": "a"})
    deleted = await things.family.delete(NAME, "")
    assert deleted.purge_time.seconds - deleted.delete_time.seconds == DELETED_KEEP_SECONDS
    with pytest.raises(NotFound):
        await things.read()
    back = await things.family.undeleting.undelete(NAME, "", "")
    now = await things.read()
    assert (back, now.uid) == (now.message, made.uid)
    assert not now.message.HasField("delete_time")
    assert not now.message.HasField("purge_time")
    assert now.revision > made.revision + 1, "no etag of a name comes twice"
    assert timeless(now) == timeless(made)
    assert await things.states() == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]
    assert await listed(things, filter='labels.team = "a"') == [("a", False)]


async def test_of_several_that_had_a_name_the_last_comes_back_or_the_one_of_a_uid(things: Things) -> None:
    first = await ended(things)
    await things.family.delete(NAME, "")
    second = await ended(things)
    await things.family.delete(NAME, "")
    undeleting = things.family.undeleting
    assert (await undeleting.undelete(NAME, "", "")).uid == second.uid
    with pytest.raises(
        AlreadyExists, match=f"has the uid {second.uid} now: delete that before {first.uid} is brought"
    ):
        await undeleting.undelete(NAME, first.uid, "")
    await things.family.delete(NAME, "")
    assert (await undeleting.undelete(NAME, first.uid, "")).uid == first.uid


async def test_what_is_not_deleted_or_was_never_there_does_not_come_back(things: Things) -> None:
    await ended(things)
    with pytest.raises(AlreadyExists, match=f"{NAME} is not deleted; a uid tells which"):
        await things.family.undeleting.undelete(NAME, "", "")
    with pytest.raises(NotFound, match=f"no deleted {PARENT}/evaluations/b is there"):
        await things.family.undeleting.undelete(f"{PARENT}/evaluations/b", "", "")
    deleted = await things.family.delete(NAME, "")
    with pytest.raises(NotFound, match="with uid other"):
        await things.family.undeleting.undelete(NAME, "other", "")
    with pytest.raises(Aborted):
        await things.family.undeleting.undelete(NAME, "", '"1"')
    assert (await things.family.undeleting.undelete(NAME, "", deleted.etag)).uid == deleted.uid


async def test_lists_show_what_is_deleted_when_they_are_asked_to(things: Things) -> None:
    for letter in "abcd":
        await ended(things, f"{PARENT}/evaluations/{letter}", labels={"team": "x"})
    for letter in "bd":
        await things.family.delete(f"{PARENT}/evaluations/{letter}", "")
    assert await listed(things) == [("c", False), ("a", False)]
    whole = [("d", True), ("c", False), ("b", True), ("a", False)]
    for page_size in (1, 2, 3, 50):
        assert await listed(things, show_deleted=True, page_size=page_size) == whole
    assert await listed(things, show_deleted=True, order_by="create_time", page_size=1) == whole[::-1]
    assert await listed(things, show_deleted=True, filter='labels.team = "x"', page_size=2) == whole
    assert await listed(things, show_deleted=True, filter='state = "CANCELLED"') == whole
    await things.family.undeleting.purge(f"{PARENT}/evaluations/d", "", "")
    assert await listed(things, show_deleted=True) == whole[1:], "what is on its way out is not shown"


async def test_what_is_needed_by_what_is_deleted_can_be_deleted_and_is_not_purged(things: Things) -> None:
    base = await ended(things, f"{PARENT}/evaluations/base")
    user = await ended(things)
    await hold(things, base, user)
    with pytest.raises(
        FailedPrecondition, match=f"is needed by {NAME}, until they have ended or are deleted"
    ):
        await things.family.delete(base.message.name, "")
    await things.family.delete(NAME, "")
    await things.family.delete(base.message.name, "")
    with pytest.raises(FailedPrecondition, match=f"is needed by {NAME}, until they are purged") as caught:
        await things.family.undeleting.purge(base.message.name, "", "")
    assert caught.value.reason == Reason.RESOURCE_IN_USE
    with pytest.raises(FailedPrecondition, match="which is deleted; undelete that first") as caught:
        await things.family.undeleting.undelete(NAME, "", "")
    assert caught.value.reason == Reason.RESOURCE_NOT_FOUND
    assert base.uid in caught.value.metadata["needed"]
    await things.family.undeleting.undelete(base.message.name, "", "")
    await things.family.undeleting.undelete(NAME, "", "")
    with pytest.raises(FailedPrecondition, match=f"is needed by {NAME}"):
        await things.family.delete(base.message.name, "")


async def test_what_is_due_goes_with_all_that_is_its_own_and_nothing_else(things: Things) -> None:
    gone, stays = await ended(things), await ended(things, f"{PARENT}/evaluations/b", labels={"a": "b"})
    async with things.database.transaction() as connection:
        rows = [{"owner": gone.uid, "number": str(number)} for number in range(2 * PURGE_BATCH + 1)]
        await connection.execute(insert(PARTS), [*rows, {"owner": stays.uid, "number": "other"}])
        told = [line("said") for _ in range(PURGE_BATCH + 1)]
        await things.family._log.append(connection, gone.uid, told)
    await hold(things, stays, gone)
    await things.family.delete(NAME, "")
    clock = Clock()
    await purging(things, clock).sweep()
    assert await count(things, PARTS.c.owner, gone.uid) == 2 * PURGE_BATCH + 1, "it may still come back"
    clock.seconds = DELETED_KEEP_SECONDS + 1
    await purging(things, clock).sweep()
    for column in (PARTS.c.owner, events.c.uid, tasks.c.uid, holds.c.hold, things.rows.table.c.uid):
        assert await count(things, column, gone.uid) == 0, column
    assert await count(things, PARTS.c.owner, stays.uid) == 1
    assert (await things.read(stays.message.name)).uid == stays.uid
    assert await count(things, events.c.uid, stays.uid) > 0
    with pytest.raises(NotFound, match="what was purged"):
        await things.family.undeleting.undelete(NAME, "", "")
    await things.family.delete(stays.message.name, "")


async def test_purge_does_not_wait(things: Things) -> None:
    made = await ended(things)
    with pytest.raises(FailedPrecondition, match="must be deleted before it is purged; delete it"):
        await things.family.undeleting.purge(NAME, "", "")
    await things.family.delete(NAME, "")
    assert (await things.family.undeleting.purge(NAME, "", "")).uid == made.uid
    for call in (things.family.undeleting.undelete, things.family.undeleting.purge):
        with pytest.raises(NotFound):
            await call(NAME, "", "")
    await purging(things).sweep()
    assert await count(things, things.rows.table.c.uid, made.uid) == 0
    assert (await ended(things)).uid != made.uid, "its name is free"


async def test_a_chain_of_what_needs_one_another_goes_when_it_is_due(things: Things) -> None:
    base = await ended(things, f"{PARENT}/evaluations/base")
    user = await ended(things)
    await hold(things, base, user)
    await things.family.delete(NAME, "")
    await things.family.delete(base.message.name, "")
    clock = Clock()
    clock.seconds = DELETED_KEEP_SECONDS + 1
    await purging(things, clock).sweep()
    for uid in (base.uid, user.uid):
        assert await count(things, things.rows.table.c.uid, uid) == 0
    assert await count(things, holds.c.held, base.uid) == 0


async def test_what_is_due_stays_as_long_as_what_needs_it_may_come_back(things: Things) -> None:
    base = await ended(things, f"{PARENT}/evaluations/base")
    user = await ended(things)
    await hold(things, base, user)
    await things.family.delete(NAME, "")
    await things.family.delete(base.message.name, "")
    async with things.database.transaction() as connection:
        table = things.rows.table
        await connection.execute(table.update().where(table.c.uid == base.uid).values(purge_time_us=1))
    await purging(things).sweep()
    await things.family.undeleting.undelete(base.message.name, "", "")
    await things.family.undeleting.undelete(NAME, "", "")


async def test_what_was_deleted_before_deletions_could_be_undone_goes_and_does_not_come_back(
    things: Things,
) -> None:
    made = await ended(things)
    await things.family.delete(NAME, "")
    table = things.rows.table
    async with things.database.transaction() as connection:
        await connection.execute(table.update().values(purge_time_us=None))
    with pytest.raises(NotFound, match="deleted before deletions could be undone"):
        await things.family.undeleting.undelete(NAME, "", "")
    assert await listed(things, show_deleted=True) == []
    clock = Clock()
    clock.seconds = DELETED_KEEP_SECONDS - DAY
    await purging(things, clock).sweep()
    assert await count(things, table.c.uid, made.uid) == 1
    clock.seconds = DELETED_KEEP_SECONDS + DAY
    await purging(things, clock).sweep()
    assert await count(things, table.c.uid, made.uid) == 0


async def test_a_purge_that_was_cut_off_goes_on(
    things: Things, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is given up has no way back, however little of it is gone already."""
    made, other = await ended(things), await ended(things, f"{PARENT}/evaluations/b")
    for one in (made, other):
        await things.family.delete(one.message.name, "")
        await things.family.undeleting.purge(one.message.name, "", "")
    cut = purging(things)
    delete_some = cut._delete_some

    async def fail(owner: Any, uids: Sequence[str]) -> bool:
        if made.uid in uids and owner is events.c.uid:
            raise RuntimeError("cut off")
        return await delete_some(owner, uids)

    monkeypatch.setattr(cut, "_delete_some", fail)
    await cut.sweep()
    assert await count(things, things.rows.table.c.uid, other.uid) == 0, "one keeps no other"
    name = things.rows.table.name
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of {name} cannot be purged together, each is tried alone",
        f"{name} {made.uid} cannot be purged",
    ]
    table = things.rows.table
    async with things.database.reading() as connection:
        left = (await connection.execute(select(table.c.purge_time_us))).scalars().all()
    assert left == [GIVEN_UP_US]
    await purging(things).sweep()
    assert await count(things, table.c.uid, made.uid) == 0


async def test_a_sweep_takes_as_many_transactions_for_several_as_for_one(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one after an upgrade finds what was deleted in years."""
    transaction, taken = things.database.transaction, 0

    def counted(**options: Any) -> Any:
        nonlocal taken
        taken += 1
        return transaction(**options)

    monkeypatch.setattr(things.database, "transaction", counted)
    transactions = []
    for number in (1, RESOURCES_AT_ONCE):
        for one in range(number):
            name = f"{PARENT}/evaluations/n{one}"
            await ended(things, name)
            await things.family.delete(name, "")
            await things.family.undeleting.purge(name, "", "")
        taken = 0
        await purging(things).sweep()
        transactions.append(taken)
        assert await things.database.rows(select(things.rows.table)) == []
    assert transactions[0] == transactions[1] < 10


async def test_what_is_brought_back_while_a_sweep_comes_to_it_stays(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await ended(things)
    await things.family.delete(NAME, "")
    clock = Clock()
    clock.seconds = DELETED_KEEP_SECONDS + 1
    sweeper = purging(things, clock)
    due = sweeper._due

    async def then_undeleted(family: Purged, without: Any) -> Any:
        found = await due(family, without)
        if found:
            await things.family.undeleting.undelete(NAME, "", "")
        return found

    monkeypatch.setattr(sweeper, "_due", then_undeleted)
    await sweeper.sweep()
    assert (await things.read()).uid == made.uid
    assert await things.states() == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]
    assert (await things.read()).message.state == State.STATE_CANCELLED
