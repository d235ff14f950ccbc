"""The event log: numbered without gaps, followed live, resumed anywhere."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest
from tests.work.watching import messages

from luthier.errors import Failure, OutOfRange, Reason, ResourceExhausted
from luthier.errors.status import failure_to_status
from luthier.v1.event_pb2 import CheckpointCommitted, Event, MetricValues, Progress
from luthier.work import feed
from luthier.work.events import attempt_changed, line, state_changed
from luthier.work.feed import Told
from luthier.work.log import EventLog

if TYPE_CHECKING:
    from tests.work.conftest import Bench

NAME = "jobs/a"
UID = "uid of jobs/a"
FAILURE = Failure(code="RESOURCE_EXHAUSTED", reason="OUT_OF_MEMORY", message="too big")


async def append(bench: Bench, *events: Event, final: bool = False) -> None:
    async with bench.database.transaction() as connection:
        await bench.log.append(connection, UID, events, final=final)


def numbered(number: int) -> Event:
    return line(str(number))


async def collect(bench: Bench, start: int = 0) -> list[Event]:
    return [
        event
        async for event in messages(bench.log.watch(UID, NAME, start))
        if not event.HasField("heartbeat")
    ]


@pytest.mark.parametrize(
    "event",
    [
        state_changed("RUNNING", "why"),
        state_changed("FAILED", error=failure_to_status(FAILURE)),
        Event(progress=Progress(phase="training", completed=3, total=9, unit="steps", remaining_seconds=1.5)),
        Event(step=7, attempt=2, metrics=MetricValues(values={"train_loss": 0.25})),
        Event(checkpoint=CheckpointCommitted(checkpoint="jobs/a/checkpoints/5")),
        line("look", "WARNING", step=7, attempt=2),
        attempt_changed("LOST", "w", "silent", attempt=2),
    ],
    ids=lambda event: str(event.WhichOneof("payload")),
)
async def test_read_returns_what_was_appended(bench: Bench, event: Event) -> None:
    given = event.SerializeToString(deterministic=True)
    async with bench.database.transaction() as connection:
        await bench.log.append(connection, UID, [event])
        (read,) = await bench.log.read(connection, UID, 1, 10)
    assert event.SerializeToString(deterministic=True) == given, "what is given is left as it is"
    assert read.sequence == 1
    assert read.HasField("event_time")
    for told_by_the_log in ("sequence", "event_time"):
        read.ClearField(told_by_the_log)
    assert read == event


async def test_watch_shows_a_failure_as_a_status(bench: Bench) -> None:
    await append(bench, state_changed("FAILED", error=failure_to_status(FAILURE)), final=True)
    error = (await collect(bench))[0].state_change.error
    assert (error.code, error.message) == (8, "too big")


async def test_watch_follows_live_and_ends_after_the_final_state(bench: Bench) -> None:
    watching = asyncio.create_task(collect(bench))
    for number in range(3):
        await asyncio.sleep(0.02)
        await append(bench, numbered(number))
    await append(bench, state_changed("SUCCEEDED"), final=True)
    await append(bench, numbered(99))
    events = await asyncio.wait_for(watching, 5.0)
    assert [event.sequence for event in events] == [1, 2, 3, 4]


async def test_watch_resumed_anywhere_misses_and_repeats_nothing(bench: Bench) -> None:
    await append(bench, *(numbered(number) for number in range(600)), state_changed("X"), final=True)
    whole = [event.sequence for event in await collect(bench)]
    assert whole == list(range(1, 602))
    for start in (1, 2, 256, 257, 600, 601):
        assert [event.sequence for event in await collect(bench, start)] == whole[start - 1 :]


async def test_watch_after_the_final_state_ends_at_once(bench: Bench) -> None:
    """Who read the last event and lost the connection before the end of the stream asks again from here."""
    await append(bench, numbered(1), state_changed("SUCCEEDED"), final=True)
    assert await asyncio.wait_for(collect(bench, 3), 2.0) == []


async def test_watch_beyond_the_next_event_is_refused(bench: Bench) -> None:
    await append(bench, numbered(1))
    with pytest.raises(OutOfRange, match=r"at most 2.*got 3") as caught:
        await collect(bench, 3)
    assert caught.value.reason == Reason.SEQUENCE_EXPIRED


async def test_watch_sends_heartbeats_while_quiet(bench: Bench) -> None:
    await append(bench, numbered(1))
    stream = messages(bench.log.watch(UID, NAME))
    assert (await anext(stream)).sequence == 1
    beat = await asyncio.wait_for(anext(stream), 2.0)
    assert beat.HasField("heartbeat")
    assert beat.sequence == 1
    await stream.aclose()


async def test_watch_refuses_a_reader_that_is_too_slow(bench: Bench) -> None:
    log = EventLog(bench.database, slow_reader_seconds=0.05)
    await append(bench, numbered(1), numbered(2))
    stream = aiter(messages(log.watch(UID, NAME)))
    await anext(stream)
    await asyncio.sleep(0.1)
    with pytest.raises(ResourceExhausted, match="watch again from sequence 2") as caught:
        await anext(stream)
    assert caught.value.reason == Reason.SLOW_READER


async def test_many_watchers_cost_one_reading_of_the_database(bench: Bench) -> None:
    counted = 0
    read = bench.log._told

    async def counting(*arguments: Any) -> list[Told]:
        nonlocal counted
        counted += 1
        return await read(*arguments)

    await append(bench, *(numbered(number) for number in range(100)))
    watching = [asyncio.create_task(collect(bench)) for _ in range(60)]
    while len(bench.log._watchers.get(UID, ())) < 60:  # noqa: ASYNC110 - nothing tells when
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    bench.log._told = counting  # type: ignore[method-assign,assignment]
    for number in range(10):
        await append(bench, numbered(number))
    await append(bench, state_changed("X"), final=True)
    answers = await asyncio.wait_for(asyncio.gather(*watching), 20.0)
    assert all([event.sequence for event in answer] == list(range(1, 112)) for answer in answers)
    # One for each commit, and one more where a watcher came between a commit and its reading.
    assert 1 <= counted <= 2 * 11
    assert bench.log._feed._chunks == {}, "nothing is kept for nobody"
    await asyncio.sleep(0.2)
    assert bench.log._waking == {}


async def test_a_slow_watcher_reads_again_what_was_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_CHUNKS", 2)
    monkeypatch.setattr(feed, "CHUNK", 8)
    slow = aiter(messages(bench.log.watch(UID, NAME)))
    await append(bench, *(numbered(number) for number in range(40)))
    seen = [(await anext(slow)).sequence]
    fast = asyncio.create_task(collect(bench, 1))
    await append(bench, *(numbered(number) for number in range(59)), state_changed("X"), final=True)
    assert [event.sequence for event in await asyncio.wait_for(fast, 10.0)] == list(range(1, 101))
    seen += [event.sequence async for event in slow if not event.HasField("heartbeat")]
    assert seen == list(range(1, 101))
    assert len(bench.log._feed._chunks) <= 2


async def test_append_of_a_rolled_back_transaction_leaves_no_number(bench: Bench) -> None:
    async def append_and_fail() -> None:
        async with bench.database.transaction() as connection:
            await bench.log.append(connection, UID, [numbered(1)])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await append_and_fail()
    await append(bench, numbered(2), state_changed("X"), final=True)
    assert [event.sequence for event in await collect(bench)] == [1, 2]


async def test_concurrent_appends_are_numbered_without_gaps(bench: Bench) -> None:
    await asyncio.gather(*(append(bench, numbered(number), numbered(number)) for number in range(20)))
    await append(bench, state_changed("X"), final=True)
    assert [event.sequence for event in await collect(bench)] == list(range(1, 42))


async def test_newest_returns_the_last_events_in_order(bench: Bench) -> None:
    await append(bench, *(numbered(number) for number in range(600)))
    async with bench.database.reading() as connection:
        newest = await bench.log.newest(connection, UID, 3)
        assert [event.log.text for event in newest] == ["597", "598", "599"]
        assert len(await bench.log.newest(connection, UID, 5000)) == 600


@pytest.mark.parametrize("seed", range(8))
async def test_first_of_finds_where_an_attempt_begins_among_events_of_none(bench: Bench, seed: int) -> None:
    draw = random.Random(seed)
    attempts = [
        attempt if draw.random() < 0.6 else 0
        for attempt in range(1, 5)
        for _ in range(draw.choice((1, 3, 40)))
    ]
    await append(bench, *(line(str(number), attempt=one) for number, one in enumerate(attempts)))
    async with bench.database.reading() as connection:
        for attempt in range(1, 6):
            first = await bench.log.first_of(connection, UID, attempt)
            before, rest = attempts[: first - 1], attempts[first - 1 :]
            assert all(one < attempt for one in before)
            assert all(one >= attempt or not one for one in rest)
        assert await bench.log.first_of(connection, "uid of nothing", 1) == 1
