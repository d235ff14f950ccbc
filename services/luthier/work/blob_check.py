"""Check that a service's blobs and what needs them are as they should be, without changing anything.

A service may run meanwhile: what is found is looked at once more before it is told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.storage import blob_refs
from luthier.storage.blobs import BlobReader, ListedBlob
from luthier.storage.reading import Readable
from luthier.work.blob_needs import Needs
from luthier.work.collecting import LOOK_SECONDS
from luthier.work.schema import tasks
from luthier.work.tasks import TaskState

FaultKind = Literal["missing", "unrecorded", "ownerless", "unneeded", "corrupt", "unheld"]
SLACK_SECONDS = 300.0
"""How late a round of a busy service may be."""
_AT_ONCE = 500
_TASK = blob_refs.task_owner("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        kind: missing: what needs it has no such blob; unrecorded: no row keeps it from being collected; ownerless: a
            row keeps it for what is not there; unneeded: nothing needs it, and it was not collected; corrupt: its bytes
            have another digest; unheld: what is worked for does not keep a resource that it is made from.
        digest: of the blob; empty: the row keeps a resource, or should.
        who: what needs the blob or the resource, or kept it; empty: nothing.
        text: what it means, and what can be done.
    """

    kind: FaultKind
    digest: str
    who: str
    text: str


@dataclass(slots=True, kw_only=True)
class Checked:
    """What was looked at, as far as it was."""

    num_needs: int = 0
    num_blobs: int = 0
    num_bytes: int = 0
    num_loose: int = 0
    loose_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobCheck:
    """A check of one service.

    Attributes:
        database: the service's, which is read.
        blobs: its store, which is read.
        needs: what its resources need.
        grace_seconds: what is younger may be on its way to be needed; a service has a while longer to collect it.
        reads: whether every byte is read and hashed.
        checked: what it has looked at.
    """

    database: Readable
    blobs: BlobReader
    needs: Needs
    grace_seconds: float
    reads: bool = True
    checked: Checked = field(default_factory=Checked)

    async def faults(self) -> AsyncIterator[Fault]:
        """Yield what is wrong. Memory: some 300 bytes for each reference."""
        names: dict[str, str] = {}
        async for fault in self._references(names):
            yield fault
        async for fault in self._missing(names):
            yield fault
        after = ""
        while listed := await self.blobs.list(after, _AT_ONCE):
            async for fault in self._listed(listed, names):
                yield fault
            after = listed[-1].digest

    async def _references(self, names: dict[str, str]) -> AsyncIterator[Fault]:
        """Yield where rows and resources disagree, as one transaction sees both; keeps who needs each blob."""
        async with self.database.reading() as connection:
            told = select(blob_refs.blob_refs.c.owner, blob_refs.blob_refs.c.digest)
            rows = {(row.owner, row.digest) for row in await connection.execute(told)}
            leased = select(tasks.c.task_id).where(tasks.c.state == TaskState.LEASED)
            owners = {blob_refs.task_owner(one) for one in (await connection.execute(leased)).scalars()}
            async for need in self.needs(connection):
                if not need.is_certain:
                    rows.discard((need.owner, need.digest))
                    continue
                self.checked.num_needs += 1
                names.setdefault(need.digest, need.name)
                if (need.owner, need.digest) not in rows:
                    text = "no row keeps it, so it may be collected: stop the service, restore a backup of its database"
                    yield Fault(kind="unrecorded", digest=need.digest, who=need.name, text=text)
                rows.discard((need.owner, need.digest))
        for owner, digest in sorted(rows):
            if owner not in owners:
                text = "a row keeps it for what is not there, or does not need it: its bytes never come back"
                yield Fault(kind="ownerless", digest=digest, who=owner, text=text)

    async def _missing(self, names: dict[str, str]) -> AsyncIterator[Fault]:
        for digest, name in names.items():
            if await self.blobs.has(digest):
                continue
            async with self.database.reading() as connection:
                if not await _is_needed(connection, digest):
                    continue  # It was let go, and has been collected since.
            text = "its bytes are not there: what needs it cannot be read; restore the blob from a backup"
            yield Fault(kind="missing", digest=digest, who=name, text=text)

    async def _listed(self, listed: Sequence[ListedBlob], names: Mapping[str, str]) -> AsyncIterator[Fault]:
        digests = [blob.digest for blob in listed]
        async with self.database.reading() as connection:
            needed = await blob_refs.needed(connection, digests)
            waiting = await blob_refs.loose_since(connection, digests)
        for blob in listed:
            self.checked.num_blobs += 1
            self.checked.num_bytes += blob.size_bytes
            if blob.digest not in needed:
                self.checked.num_loose += 1
                self.checked.loose_bytes += blob.size_bytes
                if self._is_overdue(blob, waiting) and await self._is_still_overdue(blob.digest):
                    text = (
                        f"nothing needs its {blob.size_bytes} bytes; the service notes it once it runs, and collects "
                        "it unless blob_stray_seconds is 0; else its log tells why not"
                    )
                    yield Fault(kind="unneeded", digest=blob.digest, who="", text=text)
            if self.reads and await self._is_corrupt(blob.digest):
                text = "its bytes have another digest: restore it from a backup"
                yield Fault(kind="corrupt", digest=blob.digest, who=names.get(blob.digest, ""), text=text)

    def _is_overdue(self, blob: ListedBlob, waiting: Mapping[str, int]) -> bool:
        """Tell whether a blob that nothing needs should have been collected, or noted, by a service that runs."""
        begin = max(blob.put_time, waiting.get(blob.digest, 0) / 1e6)
        return time.time() > begin + self.grace_seconds + LOOK_SECONDS + SLACK_SECONDS

    async def _is_still_overdue(self, digest: str) -> bool:
        """Look once more: since the blob was listed it may have been needed, put again, let go or collected."""
        listed = await self.blobs.list(digest[:-1], 1)
        if not listed or listed[0].digest != digest:
            return False
        async with self.database.reading() as connection:
            if await blob_refs.needed(connection, [digest]):
                return False
            return self._is_overdue(listed[0], await blob_refs.loose_since(connection, [digest]))

    async def _is_corrupt(self, digest: str) -> bool:
        sha256 = hashlib.sha256()
        try:
            async for piece in self.blobs.read(digest):
                sha256.update(piece)
        except NotFound:
            return False  # It has been collected since it was listed.
        return sha256.hexdigest() != digest


async def _is_needed(connection: AsyncConnection, digest: str) -> bool:
    """Tell whether anything but a task needs a blob: a task's worker may be about to send it."""
    columns = blob_refs.blob_refs.c
    owners = (await connection.execute(select(columns.owner).where(columns.digest == digest))).scalars()
    return any(not owner.startswith(_TASK) for owner in owners)
