"""Give back the bytes of blobs that nobody needs: soon after what needed them is gone, and what a crash left behind.

A blob is collected when no row of `storage.blob_refs` names it, and neither was it put nor did its last reference go
within the grace period. Whoever puts bytes first and refers to them a moment later has that long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import InvalidArgument
from luthier.runtime.catalogue import stores
from luthier.storage import blob_refs
from luthier.storage.blobs import BlobStore, ListedBlob
from luthier.storage.database import Database

GRACE_SECONDS = 900.0
"""Default of the grace period: far longer than a service takes from the bytes to the row that names them."""
LOOSE_SECONDS = 10.0
"""How often it is looked for what is loose long enough: one read of an index."""
LOOK_SECONDS = 600.0
"""How often every blob is looked at."""
_LISTED_AT_ONCE = 500
_COLLECTED_AT_ONCE = 32
"""Blobs that go in one transaction: others write in between."""


class CollectionMetrics:
    """What a collector finds and what it gives back."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stored = stores.STORED_BYTES.gauge(registry)
        self._collected = stores.COLLECTED_BYTES.counter(registry)

    def looked(self, needed_bytes: int, loose_bytes: int) -> None:
        """Show how many bytes there are that somebody needs, and that nobody does."""
        self._stored.labels("needed").set(needed_bytes)
        self._stored.labels("loose").set(loose_bytes)

    def collected(self, size_bytes: int) -> None:
        """Count bytes that were given back."""
        self._collected.inc(size_bytes)


class Collector:
    """Collects the blobs of one service."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        metrics: CollectionMetrics,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not grace_seconds > 0:
            raise InvalidArgument(f"blob_grace_seconds must be above 0, got {grace_seconds:g}")
        self._database = database
        self._blobs = blobs
        self._metrics = metrics
        self._grace_seconds = grace_seconds
        self._clock = clock

    async def collect_loose(self) -> None:
        """Collect what was needed once and has been loose for the grace period."""
        while True:
            before_us = round(self._before() * 1e6)
            async with self._database.reading() as connection:
                if not await blob_refs.loose_before(connection, before_us, 1):
                    return
            async with self._database.transaction(makes_room=True) as connection:
                digests = await blob_refs.loose_before(connection, before_us, _COLLECTED_AT_ONCE)
                await self._collect(connection, digests)
            if len(digests) < _COLLECTED_AT_ONCE:
                return

    async def look(self) -> None:
        """Look at every blob: collect what a crash left that no row ever named, and show how much there is of each.

        Memory: some hundred blobs of the list.
        """
        after, needed_bytes, loose_bytes = "", 0, 0
        while True:
            listed = await self._blobs.list(after, _LISTED_AT_ONCE)
            digests = [blob.digest for blob in listed]
            async with self._database.reading() as connection:
                needed = await blob_refs.needed(connection, digests)
                waiting = await blob_refs.loose_since(connection, digests)
            loose = [blob for blob in listed if blob.digest not in needed]
            needed_bytes += sum(blob.size_bytes for blob in listed if blob.digest in needed)
            loose_bytes += sum(blob.size_bytes for blob in loose)
            # What is noted as loose has its own time, which may have begun long after it was put.
            left = [blob for blob in loose if blob.digest not in waiting]
            loose_bytes -= await self._collect_left(left)
            if len(listed) < _LISTED_AT_ONCE:
                break
            after = digests[-1]
        self._metrics.looked(needed_bytes, loose_bytes)

    async def _collect_left(self, left: Sequence[ListedBlob]) -> int:
        before = self._before()
        old = [blob.digest for blob in left if blob.put_time < before]
        freed_bytes = 0
        for first in range(0, len(old), _COLLECTED_AT_ONCE):
            async with self._database.transaction(makes_room=True) as connection:
                some = old[first : first + _COLLECTED_AT_ONCE]
                waiting = await blob_refs.loose_since(connection, some)
                freed_bytes += await self._collect(connection, [one for one in some if one not in waiting])
        return freed_bytes

    async def _collect(self, connection: AsyncConnection, digests: Sequence[str]) -> int:
        """Collect those of some blobs that nobody needs; returns how many bytes that freed.

        The bytes go inside the transaction that looked: nobody can come to need them in between. When it is not
        committed, they are gone all the same, and the next look forgets the rows.
        """
        needed = await blob_refs.needed(connection, digests)
        freed_bytes = 0
        for digest in digests:
            if digest not in needed:
                freed_bytes += await self._blobs.collect(digest, self._before())
        await blob_refs.forget_loose(connection, digests)
        self._metrics.collected(freed_bytes)
        return freed_bytes

    def _before(self) -> float:
        return self._clock() - self._grace_seconds
