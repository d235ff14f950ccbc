"""What /metrics says of a service's database and disk: each time in its own series, and the room as it is now."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from tests.stores import open_database
from tests.work.hosted import serve

from luthier.runtime.catalogue import stores
from luthier.runtime.metric import Metric
from luthier.storage.disk import Disk
from luthier.work.store_metrics import DatabaseMetrics


def count(registry: CollectorRegistry, metric: Metric) -> float | None:
    """How often a histogram without labels was told a time."""
    return registry.get_sample_value(f"{metric.name}_count")


def total(registry: CollectorRegistry, metric: Metric) -> float:
    """What the times of a histogram without labels add up to."""
    return registry.get_sample_value(f"{metric.name}_sum") or 0.0


def test_statements_commits_and_waits_are_told_apart() -> None:
    registry = CollectorRegistry()
    metrics = DatabaseMetrics(registry)
    metrics.queried(1.0, "SELECT 1")
    metrics.committed(2.0)
    metrics.waited(4.0)
    told = (stores.QUERY_SECONDS, stores.COMMIT_SECONDS, stores.WRITER_WAIT)
    assert [total(registry, metric) for metric in told] == [1.0, 2.0, 4.0]
    assert [count(registry, metric) for metric in told] == [1.0, 1.0, 1.0]


async def test_who_waits_for_another_writer_is_timed_as_waiting(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    database = open_database(tmp_path / "small")
    database.observe(DatabaseMetrics(registry))
    inside, asked = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
            inside.set()
            await asked.wait()
            await asyncio.sleep(0.3)

    async def second() -> None:
        await inside.wait()
        asked.set()
        async with database.transaction() as connection:
            for _ in range(3):
                await connection.execute(text("INSERT INTO t VALUES (1)"))

    try:
        await asyncio.gather(slow(), second())
    finally:
        await database.close()
    assert count(registry, stores.WRITER_WAIT) == count(registry, stores.COMMIT_SECONDS) == 2.0
    assert (count(registry, stores.QUERY_SECONDS) or 0.0) >= 4.0
    assert total(registry, stores.WRITER_WAIT) >= 0.29
    assert total(registry, stores.COMMIT_SECONDS) > 0.0


async def test_a_service_shows_its_commits_the_room_on_its_disk_and_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [5 << 30]
    monkeypatch.setattr(Disk, "free_bytes", lambda _: room[0])
    async with serve(tmp_path / "home", min_free_bytes=3 << 30) as site:
        registry = site.parts.metrics.registry
        before = count(registry, stores.COMMIT_SECONDS)
        assert before is not None
        await site.enqueue()
        assert (count(registry, stores.COMMIT_SECONDS) or 0.0) > before
        assert registry.get_sample_value(stores.FLOOR.name) == 3 << 30
        assert registry.get_sample_value(stores.FREE.name) == 5 << 30
        room[0] = 4 << 30
        assert registry.get_sample_value(stores.FREE.name) == 4 << 30, "as it is when somebody looks"
        assert registry.get_sample_value(stores.FLOOR.name) == 3 << 30
