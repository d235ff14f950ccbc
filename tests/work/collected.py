"""Collecting and purging as if a long time had passed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from sqlalchemy import select

from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.work.collecting import GRACE_SECONDS, STRAY_SECONDS, CollectionMetrics, Collector
from luthier.work.keeping import DELETED_KEEP_SECONDS
from luthier.work.log import EventLog
from luthier.work.purging import Purged, PurgeMetrics, Purging


def collector_of(database: Database, blobs: BlobStore, seconds_later: float = 0.0) -> Collector:
    """A collector whose clock is ahead."""
    metrics = CollectionMetrics(CollectorRegistry())
    return Collector(database, blobs, metrics, clock=lambda: time.time() + seconds_later)


async def collect_later(database: Database, blobs: BlobStore) -> None:
    """Collect all that goes once every grace period is over: what was let go, and what a crash left."""
    await collector_of(database, blobs, 2 * GRACE_SECONDS).look()
    later = collector_of(database, blobs, STRAY_SECONDS + 4 * GRACE_SECONDS)
    await later.collect_loose()
    await later.look()


async def purge_later(database: Database, families: Sequence[Purged]) -> None:
    """Purge what was deleted, as it is done when its time is over; all of it goes."""
    clock, metrics = lambda: time.time() + DELETED_KEEP_SECONDS + 1, PurgeMetrics(CollectorRegistry())
    log = EventLog(database)
    await Purging(database, log, families, metrics, DELETED_KEEP_SECONDS, clock).sweep()
    for family in families:
        columns = family.rows.table.c
        left = await database.rows(select(columns.uid).where(columns.delete_time_us.is_not(None)))
        assert left == [], f"{family.rows.table.name}: something that was deleted is left"


async def digests_of(blobs: BlobStore) -> set[str]:
    """All blobs that there are."""
    return {blob.digest for blob in await blobs.list("", 1_000_000)}
