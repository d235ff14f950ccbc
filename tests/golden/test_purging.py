"""Every kind of resource made, deleted, brought back and purged many times while calls go on: nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import update
from tests.golden.answers import Asker
from tests.golden.bringing import Workers
from tests.golden.fake_worker import FakeWorker
from tests.golden.former import HOME, SERVICES, SOON_SECONDS, opened, running, soon
from tests.golden.home_files import unpack_home
from tests.golden.kinds import kinds
from tests.golden.lives import BASE, DATA, EVALUATION, MODELS, PARENT, RENDERING, TRAINING, Lives
from tests.golden.making import RestingCluster
from tests.work.collected import collect_later, purge_later

from luthier.errors import NotFound
from luthier.evaluation.aliases import repository as aliases
from luthier.evaluation.schema import alias_moves
from luthier.storage.blobs import MARK_NAME
from luthier.storage.database import Database
from luthier.storage.local_blobs import LocalBlobStore
from luthier.v1 import training_service_pb2_grpc
from luthier.v1.event_pb2 import Event, LogLine
from luthier.v1.training_service_pb2 import WatchFineTuningJobRequest
from luthier.work.keeping import ANSWER_KEEP_SECONDS
from luthier.work.peers import bearer, error_of
from luthier.work.purging import Purged
from luthier.work.requests import SqlRequestLog
from luthier.work.schema import request_log
from luthier.worker.v1 import task_pb2

KINDS = {
    "data": (task_pb2.TASK_KIND_BUILD_VERSION, task_pb2.TASK_KIND_RENDER),
    "training": (
        task_pb2.TASK_KIND_REGISTER_MODEL,
        task_pb2.TASK_KIND_TRAIN,
        task_pb2.TASK_KIND_MERGE,
        task_pb2.TASK_KIND_EXPORT,
    ),
    "evaluation": (task_pb2.TASK_KIND_EVALUATE,),
}
# Rows that go by a policy of their own: answers by request id after seven days, blobs that nothing needs once their
# grace period is over, aliases, which cannot be brought back, 30 days after their deletion.
BY_POLICY = ("request_log", "loose_blobs", "model_aliases")
ALIASES = Purged(rows=aliases.aliases(), parts=[alias_moves.c.owner])
COLLECTED = "luthier_blob_collected_bytes_total"
KINDS_SEEN = kinds() | {"luthier.v1.Rollout"}
"""What each life must have had."""
UNTOUCHED = {
    f"{service}.{table}" for service in SERVICES for table in ("alembic_version", "database_identity")
} | {
    "data.deliveries",  # nothing there tells webhooks
    "data.uploads_labels",  # they have none
    "evaluation.holds",  # nothing there is needed by others
    "evaluation.answer_files",  # they go with the end of their evaluation
    "evaluation.shares",  # likewise, also when it is cancelled
    "evaluation.predictions",  # former versions wrote them
}
"""Tables without a row of a life that has been made and has not left, however often it is looked."""
NUM_LOOKS = 20
"""Some rows, as holds between services, go soon after the need for them."""
P99_SECONDS = 0.1
MORE_DESCRIPTORS = 8
"""Of pools of connections, which are opened when there is much to do."""
MORE_PAGES = 64
"""Of a database, of pages that are not full."""
MANY, LINE_BYTES = 6000, 4096
"""Of a log of which a reader that waits has not all on its way: 24 MB."""
pytestmark = pytest.mark.e2e


class LivingCluster(RestingCluster):
    """Services that may tell webhooks, and give bytes back as soon as they may."""

    def environment(self) -> dict[str, str]:
        graces = {f"LUTHIER_{name.upper()}_BLOB_GRACE_SECONDS": "60" for name in SERVICES}
        return super().environment() | graces | {"LUTHIER_WEBHOOKS_ADDRESSES": "127.0.0.1"}


def tables(connection: sqlite3.Connection) -> set[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
    return {row[0] for row in found if not row[0].startswith("sqlite_")}


def rows(home: Path) -> dict[str, int]:
    """How many rows each table has, by service, those left out that go by a policy."""
    found = {}
    for service in SERVICES:
        with opened(home, service) as connection:
            for table in tables(connection).difference(BY_POLICY):
                number = connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
                found[f"{service}.{table}"] = number
    return found


def used_pages(home: Path) -> dict[str, int]:
    """How many pages of each database hold something."""
    found = {}
    for service in SERVICES:
        with opened(home, service) as connection:
            pages, free = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count")
            )
            found[service] = pages - free
    return found


def needed(home: Path) -> set[str]:
    """The digests of all that something needs."""
    found: set[str] = set()
    for service in SERVICES:
        with opened(home, service) as connection:
            found.update(row[0] for row in connection.execute("SELECT digest FROM blob_refs"))
    return found


def files(home: Path) -> set[str]:
    """All files beside the databases: blobs by their digests, and whatever is staged or left; no owners' marks."""
    folders = [home / service / "blobs" for service in SERVICES]
    return {path.name for folder in folders for path in folder.rglob("*") if path.is_file()} - {MARK_NAME}


def descriptors(cluster: RestingCluster) -> dict[str, int]:
    return {name: len(os.listdir(f"/proc/{cluster.pid(name)}/fd")) for name in SERVICES}


def collected_bytes(cluster: RestingCluster) -> dict[str, float]:
    """How many bytes each service has given back by itself since it was started."""
    found = {}
    for service in SERVICES:
        with urllib.request.urlopen(f"http://{cluster.metrics[service]}/metrics") as page:
            lines = page.read().decode().splitlines()
        [found[service]] = [float(line.split()[1]) for line in lines if line.startswith(f"{COLLECTED} ")]
    return found


def difference(home: Path, before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What has another number of rows than before: that, and how many now."""
    now = rows(home)
    return {table: (before[table], now[table]) for table in before if now[table] != before[table]}


async def sweep_by_policy(home: Path) -> None:
    """Do to each service's state what it does itself once enough time has passed."""
    for service in SERVICES:
        database = Database(f"sqlite+aiosqlite:///{home / service / service}.db")
        try:
            async with database.transaction() as connection:
                await connection.execute(update(request_log).values(created_at_us=0))
            await SqlRequestLog(database, ANSWER_KEEP_SECONDS).forget_old()
            if service == "evaluation":
                await purge_later(database, [ALIASES])
            await collect_later(database, LocalBlobStore(home / service / "blobs"))
            # What was collected goes a while after it was set aside; opened anew, the store has done with it.
            LocalBlobStore(home / service / "blobs")
        finally:
            await database.close()
    for service in SERVICES:
        with opened(home, service) as connection:
            for table in tables(connection).intersection(BY_POLICY):
                left = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                assert left == 0, f"{left} rows of {service}'s {table}"


class Calls(threading.Thread):
    """Reads and lists all the while, and notes how long each call took."""

    def __init__(self, asker: Asker) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.over = threading.Event()
        self._asker = asker

    def run(self) -> None:
        calls: list[tuple[str, Mapping[str, Any]]] = [
            (f"{MODELS}/GetModel", {"name": BASE}),
            (f"{TRAINING}/ListFineTuningJobs", {"parent": PARENT, "pageSize": 10}),
            (f"{DATA}/GetRendering", {"name": RENDERING}),
            (f"{EVALUATION}/ListEvaluations", {"parent": PARENT, "pageSize": 10, "showDeleted": True}),
        ]
        while not self.over.is_set():
            for rpc, request in calls:
                began = time.monotonic()
                self._asker.send(rpc, request)
                self.seconds.append(time.monotonic() - began)
            time.sleep(0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How long calls took, in milliseconds."""

    number: int
    median: float
    p99: float
    longest: float


def spread(seconds: list[float]) -> Spread:
    ordered = sorted(1000 * one for one in seconds)
    median, p99 = (ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    return Spread(
        number=len(ordered), median=round(median, 1), p99=round(p99, 1), longest=round(ordered[-1], 1)
    )


@pytest.mark.parametrize(
    "num_lives",
    [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])],
    ids=["few", "a thousand"],
)
def test_nothing_is_left_of_what_was_purged(tmp_path: Path, num_lives: int) -> None:
    cluster = LivingCluster(tmp_path / "home")
    home = cluster.home
    with running(cluster), Asker(cluster.addresses, cluster.api_key()) as asker:
        fakes = {
            name: FakeWorker(home, name, cluster.addresses[name], f"of-{name}", KINDS[name])
            for name in SERVICES
        }
        lives = Lives(asker, Workers(fakes))
        lives.begin()
        soon(lambda: rows(home)["data.held_elsewhere"] == 0)
        before, kept, pages, open_before = rows(home), needed(home), used_pages(home), descriptors(cluster)
        calls = Calls(asker)
        calls.start()
        lives.seconds.clear()
        touched: set[str] = set()
        for number in range(num_lives):
            lives.live(number)
            touched |= set() if number >= NUM_LOOKS else difference(home, before).keys()
        lives.end()
        calls.over.set()
        calls.join(30)
        soon(lambda: not difference(home, before), lambda: difference(home, before))
        more = {name: number - open_before[name] for name, number in descriptors(cluster).items()}
        assert max(more.values()) <= MORE_DESCRIPTORS, more
        assert cluster.faults() == []
        collected = collected_bytes(cluster)
    assert {kind: lives.seen[kind] for kind in KINDS_SEEN if lives.seen[kind] < num_lives} == {}
    assert before.keys() - touched == UNTOUCHED, (before.keys() - touched) ^ UNTOUCHED
    asyncio.run(sweep_by_policy(home))
    assert difference(home, before) == {}
    assert needed(home) == kept
    assert files(home) == kept, "every byte that was of a life has come back"
    grown = {name: number - pages[name] for name, number in used_pages(home).items()}
    assert max(grown.values()) <= MORE_PAGES, grown
    reads, changes = spread(calls.seconds), spread(lives.seconds)
    print(
        f"{num_lives} lives, load {os.getloadavg()[0]:.1f}\nreads {reads}\nchanges {changes}\npages {grown}\n"
        f"collected {collected}"
    )
    if num_lives >= 1000:
        assert min(collected.values()) > 0, "bytes came back while others were in use"
        assert max(reads.p99, changes.p99) <= 1000 * P99_SECONDS


def refusal(asker: Asker, rpc: str, request: Mapping[str, Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        asker.send(rpc, request)
    error = error_of(caught.value)
    return error.code, error.reason


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RestingCluster]:
    """Services on a home of former times; no worker changes anything."""
    former = RestingCluster(tmp_path / "home")
    unpack_home(HOME, former.home)
    with running(former):
        yield former


@pytest.fixture
def asker(cluster: RestingCluster) -> Iterator[Asker]:
    with Asker(cluster.addresses, cluster.api_key()) as asking:
        yield asking


def test_a_job_comes_back_with_all_that_it_had_and_goes_with_it(
    cluster: RestingCluster, asker: Asker
) -> None:
    name = f"{PARENT}/fineTuningJobs/own-template"

    def told() -> list[Any]:
        return [
            asker.send(f"{TRAINING}/ReadFineTuningJobMetrics", {"name": name}),
            asker.send(f"{TRAINING}/ListCheckpoints", {"parent": name}),
            asker.send(f"{TRAINING}/ListFineTuningJobEvents", {"parent": name}),
            asker.send(f"{TRAINING}/ListRollouts", {"parent": name}),
        ]

    job, before = asker.send(f"{TRAINING}/GetFineTuningJob", {"name": name}), told()
    assert before[1].checkpoints
    asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": name})
    assert refusal(asker, f"{TRAINING}/GetFineTuningJob", {"name": name})[0] == "NOT_FOUND"
    back = asker.send(f"{TRAINING}/UndeleteFineTuningJob", {"name": name})
    assert back.uid == job.uid
    assert told() == before
    asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": name})
    kept = rows(cluster.home)
    asker.send(f"{TRAINING}/PurgeFineTuningJob", {"name": name, "uid": job.uid})
    assert refusal(asker, f"{TRAINING}/UndeleteFineTuningJob", {"name": name})[0] == "NOT_FOUND"
    soon(lambda: rows(cluster.home)["training.fine_tuning_jobs"] == kept["training.fine_tuning_jobs"] - 1)
    gone = rows(cluster.home)
    assert kept["training.checkpoints"] - gone["training.checkpoints"] == len(before[1].checkpoints)
    assert kept["training.metric_points"] - gone["training.metric_points"] == len(before[0].points)
    assert kept["training.events"] > gone["training.events"]


def told_much(home: Path, uid: str) -> int:
    """Have a job that has ended told much before its end, more than lies on the way; returns its last number."""
    database = home / "training" / "training.db"
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        of_end = "uid = ? AND final"
        [[first, end]] = connection.execute(f"SELECT sequence, event FROM events WHERE {of_end}", [uid])
        said = Event(event_time=Event.FromString(end).event_time, log=LogLine(text="x" * LINE_BYTES))
        last = int(first) + MANY
        moved = Event.FromString(end)
        moved.sequence = last
        new = [last, moved.SerializeToString(), uid]
        connection.execute(f"UPDATE events SET sequence = ?, event = ? WHERE {of_end}", new)
        for number in range(first, last):
            said.sequence = number
            row = [uid, number, said.SerializeToString()]
            connection.execute("INSERT INTO events (uid, sequence, final, event) VALUES (?, ?, 0, ?)", row)
    return last


def read_on(watching: Iterator[Event], seen: list[int]) -> None:
    """Note the number of every event until a watch ends or is refused."""
    for event in watching:
        if not event.HasField("heartbeat"):
            seen.append(event.sequence)


def test_who_is_slow_to_read_what_is_purged_sees_no_gap_and_is_told(
    cluster: RestingCluster, asker: Asker
) -> None:
    name = f"{PARENT}/fineTuningJobs/own-template"
    job = asker.send(f"{TRAINING}/GetFineTuningJob", {"name": name})
    last = told_much(cluster.home, job.uid)

    def num_told() -> int:
        with opened(cluster.home, "training") as connection:
            found = connection.execute("SELECT count(*) FROM events WHERE uid = ?", [job.uid])
            return int(found.fetchone()[0])

    assert num_told() == last
    metadata = bearer(cluster.api_key())
    with cluster.client() as client, grpc.insecure_channel(cluster.addresses["training"]) as channel:
        stub = training_service_pb2_grpc.TrainingServiceStub(channel)
        request = WatchFineTuningJobRequest(name=name)
        watch = stub.WatchFineTuningJob(request, metadata=metadata, timeout=2 * SOON_SECONDS)
        slow: list[Iterator[Event]] = [iter(watch), iter(client.jobs.watch(name))]
        seen = [[next(events).sequence] for events in slow]
        asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": name})
        asker.send(f"{TRAINING}/PurgeFineTuningJob", {"name": name, "uid": job.uid})
        soon(lambda: num_told() == 0, num_told)
        with pytest.raises(grpc.RpcError) as refused:
            read_on(slow[0], seen[0])
        with pytest.raises(NotFound) as caught:
            read_on(slow[1], seen[1])
    error = error_of(refused.value)
    assert "was purged while it was watched" in error.message
    for one in (error, caught.value):
        assert (one.code, one.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    for numbers in seen:
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) < last, "more lay on the way than was told"
