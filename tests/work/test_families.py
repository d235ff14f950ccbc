"""What can be done with the resources of any family, on a real database and queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.work.things import NAME, PARENT, State, Thing, Things, things_in
from tests.work.watching import messages

from luthier.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reason,
)
from luthier.errors.status import failure_to_status
from luthier.runtime.paging import PageTokens
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import ListEvaluationsRequest
from luthier.v1.event_pb2 import Event
from luthier.work.elsewhere import Hold
from luthier.work.families import Needs, Work, require_state
from luthier.work.schema import held_elsewhere, holds
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

TOKENS = PageTokens(b"0123456789abcdef")
DONE = Outcome(result=task_pb2.TaskResult(evaluate=task_pb2.EvaluateResult()))
BROKEN = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="row 3: no JSON")


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


async def test_a_new_resource_is_stored_told_of_and_worked_for(things: Things) -> None:
    added = await things.add(labels={"team": "a"})
    assert (await things.read()).message == added.message
    assert (await things.read()).private == EvaluationPrivate(base_model="b")
    (event,) = await things.events()
    assert (event.sequence, event.state_change.state) == (1, "QUEUED")
    task = await things.claim()
    assert task is not None
    assert task.subject == NAME


async def test_a_resource_without_work_is_told_of_and_nothing_is_queued(things: Things) -> None:
    await things.add(queued=False)
    assert await things.states() == ["QUEUED"]
    assert await things.claim() is None


async def test_a_name_that_is_taken_leaves_neither_event_nor_task(things: Things) -> None:
    first = await things.add(queued=False)
    with pytest.raises(AlreadyExists):
        await things.add()
    assert (await things.read()).uid == first.uid
    assert await things.states() == ["QUEUED"]
    assert await things.claim() is None


async def test_what_a_transaction_took_back_was_never_told(things: Things) -> None:
    added = await things.add(queued=False)

    async def broken_off() -> None:
        async with things.database.transaction() as connection:
            await things.family.move(connection, added, State.STATE_RUNNING)
            raise KeyError("no")

    with pytest.raises(KeyError):
        await broken_off()
    assert (await things.read()).message.state == State.STATE_QUEUED
    assert await things.states() == ["QUEUED"]


async def test_a_move_stores_all_that_changes_and_tells_why(things: Things) -> None:
    added = await things.add(queued=False)
    changed = added.copy()
    changed.num_records = 7
    moved = await things.move(
        added,
        State.STATE_RUNNING,
        changed=changed,
        private=EvaluationPrivate(base_model="other"),
        why="it is time",
        attempt=2,
    )
    assert (moved.message.state, moved.message.num_records) == (State.STATE_RUNNING, 7)
    assert added.message.state == State.STATE_QUEUED, "a stored message is never changed in place"
    read = await things.read()
    assert (read.message, read.private.base_model) == (moved.message, "other")
    assert read.message.etag != added.message.etag
    event = (await things.events())[-1]
    assert (event.sequence, event.attempt) == (2, 2)
    assert (event.state_change.state, event.state_change.message) == ("RUNNING", "it is time")


async def test_a_move_without_changes_keeps_everything_but_the_state(things: Things) -> None:
    added = await things.add(queued=False, labels={"team": "a"}, seed=4)
    moved = await things.move(added, State.STATE_RUNNING)
    assert (dict(moved.message.labels), moved.message.seed) == ({"team": "a"}, 4)
    assert moved.private == added.private
    assert not moved.message.HasField("end_time")


@pytest.mark.parametrize("state", [State.STATE_CANCELLED, State.STATE_FAILED])
async def test_a_final_state_has_its_time_and_is_the_last_event(things: Things, state: int) -> None:
    ended = await things.move(await things.add(queued=False), state)
    assert ended.message.HasField("end_time")
    assert ended.message.end_time.ToMicroseconds() >= ended.message.create_time.ToMicroseconds()
    assert len(await things.events()) == 2
    assert await things.events(start_sequence=3) == [], "a watch after the final event ends at once"


async def test_a_move_that_is_not_in_the_table_changes_nothing(things: Things) -> None:
    added = await things.add(queued=False)
    with pytest.raises(
        FailedPrecondition, match="is QUEUED; it can become RUNNING, CANCELLED, FAILED"
    ) as caught:
        await things.move(added, State.STATE_SUCCEEDED)
    assert caught.value.reason == Reason.WRONG_STATE
    ended = await things.move(added, State.STATE_CANCELLED)
    with pytest.raises(FailedPrecondition, match="is CANCELLED and never changes again"):
        await things.move(ended, State.STATE_RUNNING)
    assert (await things.read()).message == ended.message
    assert await things.states() == ["QUEUED", "CANCELLED"]


async def test_a_move_of_what_was_changed_meanwhile_is_refused(things: Things) -> None:
    added = await things.add(queued=False)
    await things.move(added, State.STATE_RUNNING)
    with pytest.raises(Aborted) as caught:
        await things.move(added, State.STATE_CANCELLED)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    assert await things.states() == ["QUEUED", "RUNNING"]


async def test_a_failure_is_told_with_its_reason(things: Things) -> None:
    added = await things.add(queued=False)
    changed = added.copy()
    changed.error.CopyFrom(failure_to_status(BROKEN))
    failed = await things.move(added, State.STATE_FAILED, changed=changed)
    assert (await things.events())[-1].state_change.error == failure_to_status(BROKEN)
    with pytest.raises(FailedPrecondition, match=f"{NAME} must be SUCCEEDED, it is FAILED: row 3: no JSON"):
        require_state(failed, State.STATE_SUCCEEDED, things.family.lifecycle)
    assert require_state(failed, State.STATE_FAILED, things.family.lifecycle) is failed


async def test_what_waits_for_a_worker_ends_at_once_when_it_is_to_stop(things: Things) -> None:
    await things.add()
    cancelled = await things.cancel()
    assert cancelled.state == State.STATE_CANCELLED
    assert await things.claim() is None
    assert await things.states() == ["QUEUED", "CANCELLED"]


async def test_what_a_worker_has_is_stopping_until_the_worker_says_so(things: Things) -> None:
    await things.add()
    task = await things.claim()
    assert task is not None
    assert (await things.cancel()).state == State.STATE_CANCELLING
    assert (await things.queue.heartbeat(task.task_id, task.epoch)).cancel_requested
    stopping = await things.cancel()
    assert stopping.state == State.STATE_CANCELLING
    assert stopping.etag == (await things.read()).message.etag, "asking twice changes nothing"
    await things.finish(task, Outcome(cancelled=True))
    assert await things.states() == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]


async def test_what_has_ended_stays_as_it_is(things: Things) -> None:
    await things.add()
    task = await things.claim()
    assert task is not None
    await things.finish(task, DONE)
    ended = await things.read()
    assert await things.cancel() == ended.message
    assert await things.states() == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_a_cancel_is_of_the_resource_that_was_read(things: Things) -> None:
    old = (await things.add()).message.etag
    await things.claim()
    with pytest.raises(Aborted) as caught:
        await things.cancel(etag=old)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    assert (await things.read()).message.state == State.STATE_RUNNING
    assert (await things.cancel(etag=(await things.read()).message.etag)).state == State.STATE_CANCELLING
    with pytest.raises(NotFound):
        await things.cancel(f"{PARENT}/evaluations/none")


async def holds_of(things: Things) -> tuple[set[tuple[str, str, bool]], dict[str, bool]]:
    """What is held by whom and whether lasting, by uids; and what is held elsewhere, and whether it is let go."""
    async with things.database.reading() as connection:
        here = {(row.held, row.hold, row.lasting) for row in await connection.execute(select(holds))}
        return here, {row.hold: row.released for row in await connection.execute(select(held_elsewhere))}


async def test_what_a_resource_needs_is_held_by_the_very_transaction_that_stores_it(things: Things) -> None:
    """And let go by the very one that ends it: one that is taken back changes nothing."""
    needed, lasting = [
        await things.add(f"{PARENT}/evaluations/{name}", queued=False) for name in ("needed", "lasting")
    ]
    away = Hold(hold="h", name="projects/p/renderings/r", uid="u", holder=NAME)
    needs = Needs(until_end=(needed.uid,), lasting=(lasting.uid,), elsewhere=(away,))

    async def add(*, fails: bool) -> Thing:
        async with things.database.transaction() as connection:
            message = Evaluation(name=NAME, state=State.STATE_QUEUED)
            added = await things.family.add(connection, message, EvaluationPrivate(), needs=needs)
            if fails:
                raise KeyError("no")
            return added

    with pytest.raises(KeyError):
        await add(fails=True)
    assert await holds_of(things) == (set(), {})
    added = await add(fails=False)
    whole = {(needed.uid, added.uid, False), (lasting.uid, added.uid, True)}
    assert await holds_of(things) == (whole, {"h": False})

    async def move(*, fails: bool) -> None:
        async with things.database.transaction() as connection:
            await things.family.move(connection, added, State.STATE_CANCELLED)
            if fails:
                raise KeyError("no")

    with pytest.raises(KeyError):
        await move(fails=True)
    assert await holds_of(things) == (whole, {"h": False})
    await move(fails=False)
    assert await holds_of(things) == ({(lasting.uid, added.uid, True)}, {"h": True})


async def test_a_task_set_aside_without_its_resource_lets_go_what_that_needed(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that cannot be read stays as it is for ever: nothing will need what it was to be made from."""
    needed, lasting = [
        await things.move(
            await things.add(f"{PARENT}/evaluations/{name}", queued=False), State.STATE_CANCELLED
        )
        for name in ("needed", "lasting")
    ]
    away = Hold(hold="h", name="projects/p/renderings/r", uid="u", holder=NAME)
    async with things.database.transaction() as connection:
        message = Evaluation(name=NAME, state=State.STATE_QUEUED)
        needs = Needs(until_end=(needed.uid,), lasting=(lasting.uid,), elsewhere=(away,))
        work = Work(kind=TaskKind.EVALUATE)
        await things.family.add(connection, message, EvaluationPrivate(), work, needs)
    with pytest.raises(FailedPrecondition, match=f"needed is needed by {NAME}"):
        await things.family.delete(needed.message.name, "")

    async def unreadable(connection: object, uid: str) -> Thing:
        raise DataLoss(f"{uid} cannot be read")

    monkeypatch.setattr(things.family, "of_uid", unreadable)
    assert await things.claim() is None, "it is set aside, and its resource cannot be told"
    assert (await things.read()).message.state == State.STATE_QUEUED
    assert (await things.family.delete(needed.message.name, "")).HasField("delete_time")
    async with things.database.reading() as connection:
        assert [row.released for row in await connection.execute(select(held_elsewhere))] == [True]
    with pytest.raises(FailedPrecondition, match=f"lasting is needed by {NAME}"):
        await things.family.delete(lasting.message.name, "")


async def test_watch_begins_where_it_is_told_to(things: Things) -> None:
    await things.move(
        await things.move(await things.add(queued=False), State.STATE_RUNNING), State.STATE_FAILED
    )
    assert [event.sequence for event in await things.events()] == [1, 2, 3]
    assert [event.sequence for event in await things.events(start_sequence=2)] == [2, 3]
    with pytest.raises(OutOfRange):
        await things.events(start_sequence=5)
    with pytest.raises(NotFound):
        await things.events(f"{PARENT}/evaluations/none")


async def test_watch_brings_what_happens_while_it_is_open(things: Things) -> None:
    added = await things.add(queued=False)
    found: list[Event] = []

    async def follow() -> None:
        async with aclosing(messages(things.family.watch(NAME, 0))) as watching:
            async for event in watching:
                found.append(event)

    following = asyncio.create_task(follow())
    async with asyncio.timeout(10):
        while not found:  # noqa: ASYNC110 - the other task brings it about
            await asyncio.sleep(0.01)
        await things.move(await things.move(added, State.STATE_RUNNING), State.STATE_SUCCEEDED)
        await following
    told = [event.state_change.state for event in found if event.HasField("state_change")]
    assert told == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_a_page_holds_what_fits_its_filter_newest_first(things: Things) -> None:
    for number, team in enumerate("aabab"):
        added = await things.add(f"{PARENT}/evaluations/e{number}", queued=False, labels={"team": team})
        if number in {1, 4}:
            await things.move(added, State.STATE_RUNNING)
    await things.add("projects/other/evaluations/e0", queued=False)

    async def names(**fields: object) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = ListEvaluationsRequest(parent=PARENT, page_token=token, page_size=2, **fields)  # type: ignore[arg-type]
            page, token = await things.family.page(request, TOKENS)
            assert len(page) <= 2
            found += [one.name.rpartition("/")[2] for one in page]
            if not token:
                return found

    assert await names() == ["e4", "e3", "e2", "e1", "e0"]
    assert await names(order_by="create_time") == ["e0", "e1", "e2", "e3", "e4"]
    assert await names(filter="state=RUNNING") == ["e4", "e1"]
    assert await names(filter="labels.team=a") == ["e3", "e1", "e0"]
    with pytest.raises(InvalidArgument) as caught:
        await names(filter="seed=3")
    assert caught.value.reason == Reason.FILTER_INVALID
    first, token = await things.family.page(ListEvaluationsRequest(parent=PARENT, page_size=2), TOKENS)
    with pytest.raises(InvalidArgument) as caught:
        await things.family.page(ListEvaluationsRequest(parent="projects/other", page_token=token), TOKENS)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID
    assert len(first) == 2


async def test_what_is_read_in_a_transaction_is_as_the_transaction_sees_it(things: Things) -> None:
    added = await things.add(queued=False)
    async with things.database.transaction() as connection:
        await things.family.move(connection, added, State.STATE_RUNNING)
        seen = await things.family.get(connection, NAME)
        assert seen.message.state == State.STATE_RUNNING
        with pytest.raises(NotFound):
            await things.family.get(connection, f"{PARENT}/evaluations/none")
    with pytest.raises(NotFound):
        await things.family.read(f"{PARENT}/evaluations/none")
