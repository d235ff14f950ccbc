"""A store of blobs is one service's with one database: another one would collect there what it knows nothing of."""

from __future__ import annotations

import time
from pathlib import PurePath

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition
from luthier.storage import blob_refs, identity
from luthier.storage.blobs import MARK_NAME, BlobReader, BlobStore, Owner
from luthier.storage.reading import Readable
from luthier.work.schema import events, tasks

_LISTED_AT_ONCE = 500


async def own_blobs(database: Readable, blobs: BlobStore, service: str, *, is_beside: bool) -> None:
    """Make a store that is nobody's a service's own, with its database.

    `is_beside`: the blobs are where the service has them unless told otherwise, beside the database. Then it is enough
    that the database has ever had work: what former versions left there may be nothing that it needs.

    Raises FailedPrecondition, with both named, for another's store; for one that is nobody's and has blobs of which
    the database knows none; for a mark that is none.
    """
    async with database.reading() as connection:
        owner = await _owner(connection, service)
        if await blobs.owner() is None and not (is_beside and await _has_worked(connection)):
            await _require_known(connection, blobs, owner)
    _require(await blobs.own(owner), owner, blobs)


async def require_service(blobs: BlobReader, service: str) -> None:
    """Raise FailedPrecondition for a store that is another service's, before a database is made or migrated for it."""
    found = await blobs.owner()
    if found is not None and found.service != service:
        raise FailedPrecondition(
            f"the blobs in {blobs.place} are those of {_named(found)}, this is the {service} service, which would "
            f"delete them: {_own_folder(service)}",
            metadata={"place": blobs.place, "owner": found.mark},
        )


async def require_own(database: Readable, blobs: BlobReader, service: str) -> None:
    """Raise FailedPrecondition for a store that is another's than a service's with its database. Marks nothing."""
    async with database.reading() as connection:
        owner = await _owner(connection, service)
    _require(await blobs.owner() or owner, owner, blobs)


async def _has_worked(connection: AsyncConnection) -> bool:
    # Tasks are forgotten in time; events go with what they are of.
    found = [(await connection.execute(select(table.c.uid).limit(1))).first() for table in (events, tasks)]
    return found != [None, None]


async def _owner(connection: AsyncConnection, service: str) -> Owner:
    return Owner(service=service, database_id=await identity.database_id(connection))


def _require(found: Owner, owner: Owner, blobs: BlobReader) -> None:
    if found == owner:
        return
    hint = _own_folder(owner.service)
    if found.service == owner.service:
        hint += (
            f"; or restore the database of these blobs, or, if it is gone for good, {_by_hand(owner, blobs)}"
        )
    raise FailedPrecondition(
        f"the blobs in {blobs.place} are those of {_named(found)}, this is {_named(owner)}, which would delete them: "
        f"{hint}",
        metadata={"place": blobs.place, "owner": found.mark},
    )


async def _require_known(connection: AsyncConnection, blobs: BlobReader, owner: Owner) -> None:
    """Raise FailedPrecondition where there are blobs, and the database knows none of them.

    One that it was seen to need is enough: a crash may have left others.
    """
    now_us, after = time.time_ns() // 1000, ""
    while listed := await blobs.list(after, _LISTED_AT_ONCE):
        digests = [blob.digest for blob in listed]
        # Strays are noted from a later time on: of those it knows nothing.
        loose = await blob_refs.loose_since(connection, digests)
        if any(since <= now_us for since in loose.values()) or await blob_refs.needed(connection, digests):
            return
        after = digests[-1]
    if after:
        raise FailedPrecondition(
            f"the blobs in {blobs.place} are nobody's so far, and {_named(owner)} knows none of them: use another "
            f"folder (LUTHIER_{owner.service.upper()}_BLOBS_URL), or restore the database of these blobs, or, if they "
            f"are this service's all the same, {_by_hand(owner, blobs)}",
            metadata={"place": blobs.place},
        )


def _named(owner: Owner) -> str:
    return f"the {owner.service} service with database {owner.database_id}"


def _own_folder(service: str) -> str:
    return f"give each a folder of its own by LUTHIER_{service.upper()}_BLOBS_URL"


def _by_hand(owner: Owner, blobs: BlobReader) -> str:
    return f"write `{owner.mark}` to {PurePath(blobs.place) / MARK_NAME}"
