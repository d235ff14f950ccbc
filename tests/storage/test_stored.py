import itertools
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Column, MetaData, String, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.stored_pages import page_of
from tests.stores import open_database

from luthier.errors import Aborted, AlreadyExists, NotFound, Reason
from luthier.storage import blob_refs
from luthier.storage.database import Database
from luthier.storage.deleted import DeletedRows
from luthier.storage.message_tables import message_table
from luthier.storage.pages import Cursor
from luthier.storage.stored import Rows, Stored, require_etag
from luthier.stored.v1.data_pb2 import RenderingPrivate
from luthier.v1.event_pb2 import Progress
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.worker.v1.task_pb2 import BlobFile, Shard

START_US = 1_700_000_000_000_000
NAME = "projects/p/fineTuningJobs/a"
METADATA = MetaData()
TABLE = message_table("jobs", METADATA, Column("base_model", String, nullable=False))
PRIVATE = RenderingPrivate(model_digest="d")
Job = Stored[FineTuningJob, RenderingPrivate]


class Jobs:
    """The stored jobs of a database, at times that the test sets; without that each call comes a second later."""

    def __init__(self) -> None:
        self.times: Iterator[int] = itertools.count(START_US, 1_000_000)
        self.rows = Rows(
            TABLE,
            FineTuningJob,
            RenderingPrivate,
            columns={"base_model": lambda job, _: job.base_model},
            progress_fields=("progress", "latest_metrics"),
            clock_us=lambda: next(self.times),
        )

    async def insert(self, connection: AsyncConnection, name: str = NAME, **changes: Any) -> Job:
        return await self.rows.insert(connection, job(name, **changes), PRIVATE)


def job(name: str = NAME, **changes: Any) -> FineTuningJob:
    values: dict[str, Any] = {
        "name": name,
        "state": FineTuningJob.STATE_QUEUED,
        "labels": {"team": "red"},
        "base_model": "projects/p/models/m",
    }
    return FineTuningJob(**{**values, **changes})


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = open_database(tmp_path / "test")
    async with database.transaction() as connection:
        await connection.run_sync(METADATA.create_all)
        await connection.run_sync(blob_refs.metadata.create_all)
    yield database
    await database.close()


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


def changed(stored: Job, **changes: Any) -> FineTuningJob:
    message = stored.copy()
    for name in changes:
        message.ClearField(name)  # type: ignore[arg-type]
    message.MergeFrom(FineTuningJob(**changes))
    return message


async def test_a_new_resource_is_given_its_uid_times_and_etag(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        other = await jobs.insert(connection, f"{NAME}2")
    assert one.uid != other.uid
    assert (one.message.uid, one.message.etag, one.revision) == (one.uid, '"1"', 1)
    assert one.message.create_time.ToMicroseconds() == one.message.update_time.ToMicroseconds() == START_US
    assert one.private == PRIVATE
    for read in (await jobs.rows.read(database, NAME), one):
        assert (read, read.message, read.private) == (one, one.message, PRIVATE)
    assert one.message.labels == {"team": "red"}


async def test_the_name_of_a_resource_that_is_there_is_taken(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        with pytest.raises(AlreadyExists, match=f"{NAME} exists already"):
            await jobs.insert(connection, labels={"team": "blue"})
        assert await jobs.rows.get(connection, NAME) == one


async def test_a_resource_that_is_not_there_is_not_found(database: Database, jobs: Jobs) -> None:
    with pytest.raises(NotFound, match=f"{NAME} does not exist"):
        await jobs.rows.read(database, NAME)
    async with database.reading() as connection:
        with pytest.raises(NotFound):
            await jobs.rows.get(connection, NAME)


async def test_what_the_message_holds_and_the_code_does_not_know_is_kept_once(
    database: Database, jobs: Jobs
) -> None:
    newer, private = job(), RenderingPrivate(model_digest="d")
    unknown = b"\xf2\xff\x07\x03new"  # field 16382, as a newer version would have it
    newer.MergeFromString(unknown)
    newer.progress.MergeFromString(unknown)
    private.MergeFromString(unknown)
    async with database.transaction() as connection:
        stored = await jobs.rows.insert(connection, newer, private)
        for metric in ("loss", "accuracy"):
            stored = await jobs.rows.report(connection, stored, changed(stored, latest_metrics={metric: 1.0}))
            stored = await jobs.rows.update(
                connection, stored, changed(stored, display_name=metric), stored.copy_private()
            )
    read = await jobs.rows.read(database, NAME)
    assert read.message.SerializeToString().count(unknown) == 2
    assert read.message.progress.SerializeToString().count(unknown) == 1
    assert read.private.SerializeToString().count(unknown) == 1


async def test_a_change_leaves_the_progress_that_was_reported_meanwhile(
    database: Database, jobs: Jobs
) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        await jobs.rows.report(connection, one, changed(one, progress=Progress(completed=5)))
        await jobs.rows.update(connection, one, changed(one, display_name="new"))
    read = (await jobs.rows.read(database, NAME)).message
    assert (read.display_name, read.progress.completed) == ("new", 5)


async def test_a_name_is_for_ever(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        with pytest.raises(AssertionError, match="a name is for ever"):
            await jobs.rows.update(connection, one, changed(one, name=f"{NAME}2"))


async def test_a_state_of_newer_code_can_be_read_and_listed(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        await jobs.insert(connection, state=77)
        page = await page_of(jobs.rows, connection, "projects/p", 1)
    assert [value.state for value in page.values] == [77]


async def test_update_counts_the_revision_and_moves_the_update_time(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        two = await jobs.rows.update(
            connection,
            one,
            changed(one, state=FineTuningJob.STATE_FAILED),
            RenderingPrivate(model_digest="e"),
        )
    assert (two.uid, two.revision, two.message.etag) == (one.uid, 2, '"2"')
    assert two.message.create_time == one.message.create_time
    assert two.message.update_time.ToMicroseconds() == START_US + 1_000_000
    assert await jobs.rows.read(database, NAME) == two
    assert two.private.model_digest == "e"


async def test_update_of_a_stale_revision_is_aborted_and_changes_nothing(
    database: Database, jobs: Jobs
) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        two = await jobs.rows.update(connection, one, changed(one, display_name="first"))
        with pytest.raises(Aborted, match="its revision is 2, not 1") as caught:
            await jobs.rows.update(connection, one, changed(one, display_name="second"))
        assert caught.value.reason == Reason.ETAG_MISMATCH
        assert caught.value.metadata["etag"] == '"2"'
        assert await jobs.rows.get(connection, NAME) == two


async def test_a_stored_message_that_was_changed_in_place_is_noticed(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        mine = changed(one, display_name="mine")
        one.message.labels["team"] = "blue"
        with pytest.raises(AssertionError, match="never changed in place"):
            await jobs.rows.update(connection, one, mine)
        two = await jobs.rows.get(connection, NAME)
        two.private.model_digest = "other"
        with pytest.raises(AssertionError, match="never changed in place"):
            await jobs.rows.update(connection, two, mine)


async def test_a_report_leaves_the_revision_and_yet_loses_to_a_change(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        told = {"progress": Progress(completed=3, total=9), "latest_metrics": {"loss": 0.5}}
        two = await jobs.rows.report(connection, one, changed(one, display_name="no progress", **told))
        assert (two.revision, two.message.etag, two.message.display_name) == (1, '"1"', "")
        assert (two.message.progress.completed, dict(two.message.latest_metrics)) == (3, {"loss": 0.5})
        assert two.message.update_time.ToMicroseconds() == START_US + 1_000_000
        assert await jobs.rows.get(connection, NAME) == two
        again = await jobs.rows.report(connection, two, changed(two, latest_metrics={"acc": 1.0}))
        assert dict(again.message.latest_metrics) == {"acc": 1.0}
        done = await jobs.rows.update(connection, again, changed(again, state=FineTuningJob.STATE_FAILED))
        assert done.message.progress.completed == 3
        with pytest.raises(Aborted, match="its revision is 2, not 1"):
            await jobs.rows.report(connection, again, changed(again, progress=Progress(completed=4)))
        assert await jobs.rows.get(connection, NAME) == done


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_together_are_the_whole_in_order(
    database: Database, jobs: Jobs, newest_first: bool, limit: int
) -> None:
    random.seed(0)
    names = [f"projects/p/fineTuningJobs/{number:02}" for number in range(14)]
    jobs.times = iter([START_US + random.randrange(4) for _ in range(16)])
    async with database.transaction() as connection:
        values = [(await jobs.insert(connection, name)).message for name in names]
        for name in ("projects/q/fineTuningJobs/x", "projects/p/fineTuningJobs/01/parts/x"):
            await jobs.insert(connection, name)
    seen: list[FineTuningJob] = []
    after: Cursor | None = None
    async with database.reading() as connection:
        while True:
            page = await page_of(
                jobs.rows, connection, "projects/p", limit, after=after, newest_first=newest_first
            )
            assert len(page.values) <= limit
            seen += page.values
            if page.next is None:
                break
            after = Cursor.of(page.next.parts())
    order = sorted(values, key=lambda v: (v.create_time.ToMicroseconds(), v.name), reverse=newest_first)
    assert seen == order


async def test_pages_filter_by_state_label_and_extra_column(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        await jobs.insert(connection, "projects/p/fineTuningJobs/a")
        failed = FineTuningJob.STATE_FAILED
        await jobs.insert(connection, "projects/p/fineTuningJobs/b", state=failed, labels={"k-1": "v"})
        await jobs.insert(connection, "projects/p/fineTuningJobs/c", base_model="other", labels={})

        async def found(equals: Mapping[str, str]) -> str:
            page = await page_of(jobs.rows, connection, "projects/p", 9, equals=equals, newest_first=False)
            return "".join(value.name[-1] for value in page.values)

        assert await found({}) == "abc"
        assert await found({"state": "QUEUED"}) == "ac"
        assert await found({"labels.k-1": "v"}) == "b"
        assert await found({"labels.team": "red", "state": "QUEUED"}) == "a"
        assert await found({"base_model": "other"}) == "c"
        assert await found({"labels.team": "' OR 1=1 --"}) == ""
        with pytest.raises(ValueError, match=r"must be one of state, labels\.<key>, base_model, got 'uid'"):
            await found({"uid": "u1"})


async def test_update_of_labels_moves_the_resource_to_where_they_are_looked_for(
    database: Database, jobs: Jobs
) -> None:
    async def found(connection: AsyncConnection, **labels: str) -> list[str]:
        equals = {f"labels.{key}": value for key, value in labels.items()}
        page = await page_of(jobs.rows, connection, "projects/p", 9, equals=equals)
        return [value.name[-1] for value in page.values]

    async with database.transaction() as connection:
        one = await jobs.insert(connection)
        await jobs.insert(connection, "projects/p/fineTuningJobs/b", labels={"team": "red", "tier": "1"})
        assert await found(connection, team="red") == ["b", "a"]
        assert await found(connection, team="red", tier="1") == ["b"]
        one = await jobs.rows.update(connection, one, changed(one, labels={"team": "blue"}))
        assert await found(connection, team="red") == ["b"]
        assert await found(connection, team="blue") == ["a"]
        await jobs.rows.update(connection, one, changed(one, labels={}))
        assert await found(connection, team="blue") == []


async def test_no_etag_of_a_name_comes_twice(database: Database, jobs: Jobs) -> None:
    """Who wants to delete what was looked at must not delete the next resource of its name."""
    async with database.transaction() as connection:
        old = await jobs.rows.update(connection, *twice(await jobs.insert(connection)))
        other = await jobs.insert(connection, "projects/p/fineTuningJobs/other")
        await jobs.rows.delete(connection, old)
        new = await jobs.insert(connection)
        assert (old.message.etag, other.message.etag, new.message.etag) == ('"2"', '"1"', '"4"')
        assert new.message.update_time == new.message.create_time
        with pytest.raises(Aborted):
            require_etag(new, old.message.etag)
        await jobs.rows.delete(connection, new)
        assert (await jobs.insert(connection)).message.etag == '"6"'
        plan = await connection.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT max(revision) FROM jobs WHERE name = 'n' AND delete_time_us IS NOT NULL"
            )
        )
        assert "USING INDEX ix_jobs_deleted" in str(plan.all())


def twice(stored: Stored[FineTuningJob, RenderingPrivate]) -> tuple[Any, FineTuningJob]:
    return stored, stored.copy()


async def test_labels_are_kept_by_uid_and_go_with_their_resource(database: Database, jobs: Jobs) -> None:
    async def rows(connection: AsyncConnection) -> list[tuple[str, str, str]]:
        found = await connection.execute(text("SELECT uid, name, value FROM jobs_labels ORDER BY value"))
        return [tuple(row) for row in found]

    async with database.transaction() as connection:
        old = await jobs.insert(connection, labels={"team": "red"})
        name = old.message.name
        assert await rows(connection) == [(old.uid, name, "red")]
        await jobs.rows.delete(connection, old)
        assert await rows(connection) == []
        new = await jobs.insert(connection, labels={"team": "blue"})
        assert await rows(connection) == [(new.uid, name, "blue")]
        equals = {"labels.team": "blue"}
        page = await page_of(jobs.rows, connection, "projects/p", 9, equals=equals)
        assert [one.uid for one in page.values] == [new.uid]


async def test_an_etag_is_the_resource_s_own_or_empty(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.insert(connection)
    require_etag(one, "")
    require_etag(one, '"1"')
    with pytest.raises(Aborted, match='has the etag "1", got "7"; read it again') as caught:
        require_etag(one, '"7"')
    assert caught.value.reason == Reason.ETAG_MISMATCH


async def kept(database: Database) -> set[tuple[str, str]]:
    table = blob_refs.blob_refs
    return {(row["owner"], row["digest"]) for row in await database.rows(select(table))}


def needing(*digests: str) -> RenderingPrivate:
    return RenderingPrivate(shards=[Shard(file=BlobFile(path="r", sha256=digest)) for digest in digests])


async def test_what_a_resource_needs_is_kept_from_its_first_to_its_last_transaction(
    database: Database, jobs: Jobs
) -> None:
    a, b, c = "a" * 64, "b" * 64, "c" * 64
    async with database.transaction() as connection:
        one = await jobs.rows.insert(connection, job(), needing(a, b))
        other = await jobs.rows.insert(connection, job(f"{NAME}2"), needing(b))
    assert await kept(database) == {(one.uid, a), (one.uid, b), (other.uid, b)}
    async with database.transaction() as connection:
        one = await jobs.rows.update(connection, one, changed(one, base_model="another"))
        one = await jobs.rows.update(connection, one, changed(one), needing(b, c))
    assert await kept(database) == {(one.uid, b), (one.uid, c), (other.uid, b)}
    async with database.transaction() as connection:
        await jobs.rows.delete(connection, one)
        await jobs.rows.delete(connection, other, 60.0)
    assert await kept(database) == {(other.uid, b)}, "it may come back"
    async with database.transaction() as connection:
        deleted = DeletedRows(jobs.rows)
        await deleted.give_up(connection, other.uid)
        await deleted.purge(connection, other.uid)
    assert await kept(database) == set()


async def test_a_change_that_is_undone_changes_nothing_that_is_kept(database: Database, jobs: Jobs) -> None:
    async with database.transaction() as connection:
        one = await jobs.rows.insert(connection, job(), needing("a" * 64))

    async def change_and_fail() -> None:
        async with database.transaction() as connection:
            await jobs.rows.update(connection, one, changed(one), needing("b" * 64))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await change_and_fail()
    assert await kept(database) == {(one.uid, "a" * 64)}
