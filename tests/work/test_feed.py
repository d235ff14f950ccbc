"""Events on their way to watchers: read once for all, kept in bounds, never missed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from luthier.v1 import event_pb2
from luthier.work import feed
from luthier.work.feed import CHUNK, Feed, Told


class Log:
    """A log in memory that counts its readings, each of which takes as long as `gate` is closed."""

    def __init__(self) -> None:
        self.size = 0
        self.readings: list[tuple[int, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, subject: str, first: int, limit: int) -> Sequence[Told]:
        self.readings.append((first, limit))
        last = min(self.size, first + limit - 1)
        await self.gate.wait()
        return [
            Told(sequence=number, final=False, wire=event_pb2.Event(sequence=number).SerializeToString())
            for number in range(first, last + 1)
        ]


def numbers(events: Sequence[Told]) -> list[int]:
    return [event.sequence for event in events]


async def test_a_log_without_its_beginning_is_read_from_where_it_begins() -> None:
    class Trimmed(Log):
        async def load(self, subject: str, first: int, limit: int) -> Sequence[Told]:
            return await super().load(subject, max(first, CHUNK + 100), limit)

    log = Trimmed()
    one = Feed(log.load)
    log.size = 3 * CHUNK
    assert numbers(await one.events("s", CHUNK + 100)) == list(range(CHUNK + 100, 2 * CHUNK + 1))
    assert numbers(await one.events("s", CHUNK + 120)) == list(range(CHUNK + 120, 2 * CHUNK + 1))
    assert numbers(await one.events("s", 2 * CHUNK + 1)) == list(range(2 * CHUNK + 1, 3 * CHUNK + 1))
    assert numbers(await one.events("s", 1)) == [], "nothing of another chunk"


async def test_those_who_ask_at_once_wait_for_one_reading() -> None:
    log = Log()
    log.size = 10
    log.gate.clear()
    asked = [asyncio.create_task(Feed.events(one, "s", 1)) for one in [Feed(log.load)] * 50]
    await asyncio.sleep(0)
    log.gate.set()
    answers = await asyncio.gather(*asked)
    assert [numbers(answer) for answer in answers] == [list(range(1, 11))] * 50
    assert log.readings == [(1, CHUNK)]
    assert len({id(answer[0].wire) for answer in answers}) == 1, "the same bytes"


async def test_what_was_read_is_read_again_only_after_a_touch_and_from_where_it_ended() -> None:
    log, told = Log(), []
    one = Feed(log.load)
    log.size = 3
    told.append(numbers(await one.events("s", 2)))
    log.size = 5
    told.append(numbers(await one.events("s", 2)))
    one.touch("s")
    told.append(numbers(await one.events("s", 2)))
    assert told == [[2, 3], [2, 3], [2, 3, 4, 5]]
    assert log.readings == [(1, CHUNK), (4, CHUNK - 3)]


async def test_what_comes_while_the_log_is_read_is_not_missed() -> None:
    log = Log()
    one = Feed(log.load)
    log.size = 3
    log.gate.clear()
    asked = asyncio.create_task(one.events("s", 1))
    await asyncio.sleep(0)
    log.size = 4
    one.touch("s")
    log.gate.set()
    assert numbers(await asked) == [1, 2, 3]
    assert numbers(await one.events("s", 4)) == [4]


async def test_a_full_chunk_is_never_read_again() -> None:
    log = Log()
    one = Feed(log.load)
    log.size = CHUNK + 2
    assert numbers(await one.events("s", CHUNK)) == [CHUNK]
    one.touch("s")
    assert numbers(await one.events("s", 1)) == list(range(1, CHUNK + 1))
    assert len(log.readings) == 1
    await one.refresh("s")
    assert numbers(await one.events("s", CHUNK + 1)) == [CHUNK + 1, CHUNK + 2]
    assert len(log.readings) == 2, "the refresh has read what lies behind the full chunk"


async def test_chunks_are_bounded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_CHUNKS", 3)
    log = Log()
    log.size = 10 * CHUNK
    one = Feed(log.load)
    for index in range(10):
        await one.events("s", index * CHUNK + 1)
    assert len(one._chunks) == 3
    assert numbers(await one.events("s", 1))[0] == 1
    assert len(log.readings) == 11


async def test_a_reading_that_fails_is_told_and_tried_again() -> None:
    log = Log()
    log.size = 2
    fails = [OSError("disk")]

    async def load(subject: str, first: int, limit: int) -> Sequence[Told]:
        if fails:
            raise fails.pop()
        return await log.load(subject, first, limit)

    one = Feed(load)
    with pytest.raises(OSError, match="disk"):
        await one.events("s", 1)
    assert numbers(await one.events("s", 1)) == [1, 2]


async def test_a_subject_that_nobody_watches_is_let_go() -> None:
    log = Log()
    log.size = 2
    one = Feed(log.load)
    await one.events("s", 1)
    one.touch("s")
    one.forget("s")
    assert (len(one._chunks), one.version("s")) == (0, 0)


async def test_a_subject_whose_last_watcher_leaves_while_it_is_read_is_let_go_too() -> None:
    log = Log()
    one = Feed(log.load)
    one.touch("s")
    log.size = CHUNK - 1
    await one.events("s", 1)
    log.size = CHUNK
    one.touch("s")
    log.gate.clear()
    reading = asyncio.create_task(one.refresh("s"))
    await asyncio.sleep(0)
    one.forget("s")
    log.gate.set()
    await reading
    assert (len(one._chunks), one.version("s")) == (0, 0)
