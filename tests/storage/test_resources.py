import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import Column, MetaData, String, text
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, AlreadyExists, NotFound, Reason
from luthier.storage.database import Database
from luthier.storage.pages import Cursor, parent_of
from luthier.storage.resources import Resources, resource_table

NOW = datetime(2026, 11, 23, 20, 15, 30, 123457, tzinfo=UTC)


class Mode(StrEnum):
    ALL = "ALL"
    LAST = "LAST"


class State(StrEnum):
    ACTIVE = "ACTIVE"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    rate: float
    cycles: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    name: str
    uid: str
    state: State
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    kind: str
    mode: Mode = Mode.ALL
    expire_time: datetime | None = None
    schedule: Linear | Cosine | None = None
    history: tuple[Linear | Cosine, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)


METADATA = MetaData()
TABLE = resource_table("things", METADATA, Column("kind", String, nullable=False))
THINGS = Resources(TABLE, Thing, clock=lambda: NOW + timedelta(seconds=1))


def thing(name: str = "projects/p/things/a", **changes: object) -> Thing:
    value = Thing(
        name=name,
        uid="u1",
        state=State.ACTIVE,
        labels={"team": "red"},
        create_time=NOW,
        update_time=NOW,
        revision=1,
        kind="plain",
    )
    return replace(value, **changes)  # type: ignore[arg-type]


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    async with database.transaction() as connection:
        await connection.run_sync(METADATA.create_all)
    yield database
    await database.close()


FULL = thing(
    mode=Mode.LAST,
    state=State.DELETED,
    expire_time=NOW + timedelta(microseconds=1),
    schedule=Cosine(rate=0.1, cycles=(1, 2)),
    history=(Linear(rate=1e-300), Cosine(rate=2.0)),
    settings={"a": 0.1 + 0.2},
)


@pytest.mark.parametrize("value", [thing(), FULL, thing(schedule=Linear(rate=0.5))])
async def test_get_returns_what_insert_was_given(database: Database, value: Thing) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, value)
    async with database.reading() as connection:
        again = await THINGS.get(connection, value.name)
    assert again == value
    assert type(again.state) is State
    assert type(again.history) is tuple
    assert again.create_time.tzinfo is UTC


async def test_insert_keeps_the_instant_of_a_time_in_another_zone(database: Database) -> None:
    value = thing(create_time=NOW.astimezone(timezone(timedelta(hours=5, minutes=30))))
    async with database.transaction() as connection:
        await THINGS.insert(connection, value)
        assert (await THINGS.get(connection, value.name)).create_time == NOW


async def test_insert_of_a_name_that_is_taken_changes_nothing(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, thing())
        with pytest.raises(AlreadyExists, match="projects/p/things/a exists already"):
            await THINGS.insert(connection, thing(uid="u2"))
        assert (await THINGS.get(connection, "projects/p/things/a")).uid == "u1"


async def test_absent_resource_is_none_to_find_and_not_found_to_get(database: Database) -> None:
    async with database.reading() as connection:
        assert await THINGS.find(connection, "projects/p/things/b") is None
        with pytest.raises(NotFound, match="projects/p/things/b does not exist"):
            await THINGS.get(connection, "projects/p/things/b")


async def test_update_counts_the_revision_and_moves_the_update_time(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, thing())
        stored = await THINGS.update(connection, thing(state=State.DELETED, kind="other"))
        assert stored == thing(
            state=State.DELETED, kind="other", revision=2, update_time=NOW + timedelta(seconds=1)
        )
        assert await THINGS.get(connection, stored.name) == stored


async def test_update_of_a_stale_revision_is_aborted_and_changes_nothing(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, thing())
        stored = await THINGS.update(connection, thing(kind="first"))
        with pytest.raises(Aborted, match="its revision is 2, not 1") as caught:
            await THINGS.update(connection, thing(kind="second"))
        assert caught.value.reason == Reason.ETAG_MISMATCH
        assert caught.value.metadata["etag"] == '"2"'
        assert await THINGS.get(connection, stored.name) == stored
        with pytest.raises(NotFound):
            await THINGS.update(connection, thing("projects/p/things/b"))


async def test_a_report_leaves_the_revision_and_yet_loses_to_a_change(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, thing())
        reported = await THINGS.report(connection, thing(kind="half"))
        assert reported == thing(kind="half", revision=1, update_time=NOW + timedelta(seconds=1))
        assert await THINGS.get(connection, reported.name) == reported
        changed = await THINGS.update(connection, replace(reported, state=State.DELETED))
        with pytest.raises(Aborted, match="its revision is 2, not 1"):
            await THINGS.report(connection, reported)
        assert await THINGS.get(connection, reported.name) == changed
        with pytest.raises(NotFound):
            await THINGS.report(connection, thing("projects/p/things/b"))


async def test_row_written_before_a_field_was_added_reads_with_its_default(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, FULL)
        await connection.execute(text("UPDATE things SET body = json_remove(body, '$.schedule')"))
        assert await THINGS.get(connection, FULL.name) == replace(FULL, schedule=None)


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_together_are_the_whole_in_order(
    database: Database, newest_first: bool, limit: int
) -> None:
    random.seed(0)
    values = [
        thing(f"projects/p/things/{i:02}", create_time=NOW + timedelta(microseconds=random.randrange(4)))
        for i in range(14)
    ]
    async with database.transaction() as connection:
        for value in [*values, thing("projects/q/things/x"), thing("projects/p/things/01/parts/x")]:
            await THINGS.insert(connection, value)
    seen: list[Thing] = []
    after: Cursor | None = None
    async with database.reading() as connection:
        while True:
            page = await THINGS.page(
                connection, parent="projects/p", limit=limit, after=after, newest_first=newest_first
            )
            assert len(page.values) <= limit
            seen += page.values
            if page.next is None:
                break
            after = Cursor.of(page.next.parts())
    assert seen == sorted(values, key=lambda v: (v.create_time, v.name), reverse=newest_first)


async def test_page_after_a_cursor_neither_repeats_nor_skips_when_resources_come_and_go(
    database: Database,
) -> None:
    async with database.transaction() as connection:
        for i in range(4):
            await THINGS.insert(
                connection, thing(f"projects/p/things/{i}", create_time=NOW + timedelta(seconds=i))
            )
        first = await THINGS.page(connection, parent="projects/p", limit=2, after=None, newest_first=True)
        await THINGS.insert(connection, thing("projects/p/things/9", create_time=NOW + timedelta(seconds=9)))
        second = await THINGS.page(connection, parent="projects/p", limit=2, after=first.next)
    assert [value.name[-1] for value in (*first.values, *second.values)] == ["3", "2", "1", "0"]
    assert second.next is None


async def test_page_filters_by_state_label_and_extra_column(database: Database) -> None:
    async with database.transaction() as connection:
        await THINGS.insert(connection, thing("projects/p/things/a"))
        await THINGS.insert(
            connection, thing("projects/p/things/b", state=State.DELETED, labels={"k-1": "v"})
        )
        await THINGS.insert(connection, thing("projects/p/things/c", kind="other", labels={}))

        async def found(equals: Mapping[str, str]) -> str:
            page = await THINGS.page(
                connection, parent="projects/p", limit=9, equals=equals, newest_first=False
            )
            return "".join(value.name[-1] for value in page.values)

        assert await found({}) == "abc"
        assert await found({"state": "ACTIVE"}) == "ac"
        assert await found({"labels.k-1": "v"}) == "b"
        assert await found({"labels.team": "red", "state": "ACTIVE"}) == "a"
        assert await found({"kind": "other"}) == "c"
        assert await found({"labels.team": "' OR 1=1 --"}) == ""
        with pytest.raises(ValueError, match=r"must be one of state, labels\.<key>, kind, got 'uid'"):
            await found({"uid": "u1"})


def test_parent_of_drops_the_last_collection_and_id() -> None:
    assert parent_of("projects/p/datasets/d/versions/v") == "projects/p/datasets/d"
    assert parent_of("projects/p") == ""


async def test_update_of_labels_moves_the_resource_to_where_they_are_looked_for(database: Database) -> None:
    async def found(connection: AsyncConnection, **labels: str) -> list[str]:
        equals = {f"labels.{key}": value for key, value in labels.items()}
        page = await THINGS.page(connection, parent="projects/p", limit=9, equals=equals)
        return [value.name[-1] for value in page.values]

    async with database.transaction() as connection:
        await THINGS.insert(connection, thing())
        await THINGS.insert(connection, thing("projects/p/things/b", labels={"team": "red", "tier": "1"}))
        assert await found(connection, team="red") == ["b", "a"]
        assert await found(connection, team="red", tier="1") == ["b"]
        stored = await THINGS.update(connection, thing(labels={"team": "blue"}))
        assert await found(connection, team="red") == ["b"]
        assert await found(connection, team="blue") == ["a"]
        await THINGS.update(connection, replace(stored, labels={}))
        assert await found(connection, team="blue") == []
