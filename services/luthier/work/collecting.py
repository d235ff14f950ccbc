"""Give back the bytes of blobs that nobody needs: soon after what needed them is gone, and what a crash left behind.

A blob is collected when no row of `storage.blob_refs` names it, and neither was it put nor did its last reference go
within the grace period. Whoever puts bytes first and refers to them a moment later has that long.

A blob that no row ever named, a stray, is only noted when it is found; its grace period begins a long time after that.
A database that is new, or older than the blobs, knows nothing of most of them, and is no reason to delete them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import InvalidArgument, LuthierError
from luthier.runtime.catalogue import stores
from luthier.storage import blob_refs
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database

GRACE_SECONDS = 900.0
"""Default of the grace period: far longer than a service takes from the bytes to the row that names them."""
LEAST_GRACE_SECONDS = 60.0
"""Less is shorter than a call may take."""
STRAY_SECONDS = 86_400.0
"""Default of how long strays stay before their grace period: long enough to notice a wrong database."""
LOOSE_SECONDS = 10.0
"""How often it is looked for what is loose long enough: one read of an index."""
LOOK_SECONDS = 600.0
"""How often every blob is looked at."""
_LISTED_AT_ONCE = 500
_COLLECTED_AT_ONCE = 32
"""Blobs that go in one transaction: others write in between."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long bytes stay that nothing needs.

    Attributes:
        grace_seconds: since they were put, and since their last reference went.
        stray_seconds: before that, since they were found, when no row ever named them; 0: they are never collected.
    """

    grace_seconds: float = GRACE_SECONDS
    stray_seconds: float = STRAY_SECONDS


def patience_of(grace_seconds: float, stray_seconds: float) -> Patience:
    """Return what a service's settings say. Raises InvalidArgument, with what is right."""
    if not LEAST_GRACE_SECONDS <= grace_seconds < math.inf:
        raise InvalidArgument(
            f"blob_grace_seconds must be finite and at least {LEAST_GRACE_SECONDS:g}, got {grace_seconds:g}"
        )
    if not (stray_seconds == 0 or grace_seconds <= stray_seconds < math.inf):
        raise InvalidArgument(
            f"blob_stray_seconds must be 0 (never) or finite and at least blob_grace_seconds ({grace_seconds:g}), "
            f"got {stray_seconds:g}"
        )
    return Patience(grace_seconds=grace_seconds, stray_seconds=stray_seconds)


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
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._metrics = metrics
        self._patience = patience
        self._clock = clock
        self._stuck: set[str] = set()

    async def collect_loose(self) -> None:
        """Collect what has been loose for the grace period. What cannot be collected is left for after a look."""
        after = blob_refs.FIRST_LOOSE
        while True:
            before_us = round(self._before() * 1e6)
            async with self._database.reading() as connection:
                if not await blob_refs.loose_before(connection, before_us, after, 1):
                    return
            async with self._database.transaction(makes_room=True) as connection:
                loose = await blob_refs.loose_before(connection, before_us, after, _COLLECTED_AT_ONCE)
                await self._collect(
                    connection, [one.digest for one in loose if one.digest not in self._stuck]
                )
            if len(loose) < _COLLECTED_AT_ONCE:
                return
            after = loose[-1]

    async def look(self) -> None:
        """Look at every blob: note strays that a crash left, or that are another database's, and show what there is.

        Memory: some hundred blobs of the list.
        """
        self._stuck.clear()
        after, needed_bytes, loose_bytes = "", 0, 0
        strays: list[int] = []
        while listed := await self._blobs.list(after, _LISTED_AT_ONCE):
            digests = [blob.digest for blob in listed]
            async with self._database.reading() as connection:
                needed = await blob_refs.needed(connection, digests)
                noted = await blob_refs.loose_since(connection, digests)
            loose = [blob for blob in listed if blob.digest not in needed]
            needed_bytes += sum(blob.size_bytes for blob in listed if blob.digest in needed)
            loose_bytes += sum(blob.size_bytes for blob in loose)
            found = [one for one in loose if one.digest not in noted and one.put_time < self._before()]
            await self._note_strays([one.digest for one in found])
            strays += [one.size_bytes for one in found]
            after = digests[-1]
        self._metrics.looked(needed_bytes, loose_bytes)
        self._tell(strays, logging.WARNING if needed_bytes else logging.ERROR)

    async def _note_strays(self, digests: Sequence[str]) -> None:
        stray_seconds = self._patience.stray_seconds
        if not digests or stray_seconds == 0:
            return
        since_us = round((self._clock() + stray_seconds) * 1e6)
        async with self._database.transaction(makes_room=True) as connection:
            await blob_refs.note_strays(connection, digests, since_us)

    def _tell(self, sizes: Sequence[int], level: int) -> None:
        if not sizes:
            return
        seconds = self._patience.stray_seconds
        fate = f"they are deleted in {seconds / 3600:g} h" if seconds else "they stay"
        _logger.log(
            level,
            "%d blobs of %d bytes are there that this database never named, %s: if it is new, or was restored, stop "
            "the service and restore the database that belongs to them; blob_stray_seconds=0 keeps such blobs",
            len(sizes),
            sum(sizes),
            fate,
        )

    async def _collect(self, connection: AsyncConnection, digests: Sequence[str]) -> None:
        """Collect those of some blobs that nobody needs.

        The bytes go inside the transaction that looked: nobody can come to need them in between. When it is not
        committed, they are gone all the same, and the next round forgets the rows.
        """
        needed = await blob_refs.needed(connection, digests)
        freed_bytes = 0
        for digest in digests:
            if digest not in needed:
                freed_bytes += await self._collect_one(digest)
        await blob_refs.forget_loose(connection, [one for one in digests if one not in self._stuck])
        self._metrics.collected(freed_bytes)

    async def _collect_one(self, digest: str) -> int:
        try:
            return await self._blobs.collect(digest, self._before())
        except (OSError, LuthierError) as error:  # others go on; this one is tried again after the next look
            self._stuck.add(digest)
            _logger.error("a blob cannot be collected", extra={"digest": digest, "detail": str(error)})
            return 0

    def _before(self) -> float:
        return self._clock() - self._patience.grace_seconds
