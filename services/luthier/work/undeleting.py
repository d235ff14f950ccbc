"""Deleting what nothing needs, so that it can be brought back; bringing it back; and giving it up for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import AlreadyExists, FailedPrecondition, Reason
from luthier.storage.database import Database
from luthier.storage.deleted import DeletedRows
from luthier.storage.resource_messages import ResourceMessage
from luthier.storage.stored import Rows, Stored, require_etag
from luthier.work import elsewhere
from luthier.work.holds import Holds
from luthier.work.keeping import Keeping

M = TypeVar("M", bound=ResourceMessage)
P = TypeVar("P", bound=Message)


async def delete_free(
    connection: AsyncConnection,
    rows: Rows[M, P],
    stored: Stored[M, P],
    keep_seconds: float | None,
    parts: Sequence[str] = (),
) -> Stored[M, P]:
    """Delete a resource that nothing needs: it stays for a while, and holds what it needs. Raises RESOURCE_IN_USE.

    `keep_seconds` as `Rows.delete` has it: what holds resources of other services cannot come back, since those are let
    go. `parts` are uids of what goes with it, and must not be needed either.
    """
    holds = Holds()
    await holds.require_free(connection, stored, parts)
    deleted = await rows.delete(connection, stored, keep_seconds)
    await holds.rest(connection, stored.uid)
    await elsewhere.release_all(connection, stored.uid)
    return deleted


class Undeleting(Generic[M, P]):
    """Deletes resources of one family, brings them back, or gives them up."""

    def __init__(self, rows: Rows[M, P], database: Database, keeping: Keeping) -> None:
        self._rows = rows
        self._deleted = DeletedRows(rows)
        self._database = database
        self._keep_seconds = keeping.deleted_keep_seconds
        self._holds = Holds()

    async def delete(
        self, connection: AsyncConnection, stored: Stored[M, P], parts: Sequence[str] = ()
    ) -> Stored[M, P]:
        """Delete a resource that nothing needs, nor what goes with it. Raises RESOURCE_IN_USE."""
        return await delete_free(connection, self._rows, stored, self._keep_seconds, parts)

    async def undelete(self, name: str, uid: str, etag: str) -> M:
        """Bring back what had a name and was deleted last, or of all that had it the one of a uid.

        Raises:
            NotFound: there is none, or it was purged.
            AlreadyExists: the name is another one's now, or it was never deleted.
            Aborted: ETAG_MISMATCH.
            FailedPrecondition: RESOURCE_NOT_FOUND; what it needs is deleted too: the message names that.
        """
        async with self._database.transaction() as connection:
            now = await self._rows.find(connection, name)
            if now is not None and uid in ("", now.uid):
                raise AlreadyExists(
                    f"{name} is not deleted; a uid tells which of those is meant that had its name before",
                    metadata={"name": name, "uid": now.uid},
                )
            deleted = await self._deleted.find(connection, name, uid)
            require_etag(deleted, etag)
            if now is not None:
                raise AlreadyExists(
                    f"{name} has the uid {now.uid} now: delete that before {uid} is brought back under its name",
                    metadata={"name": name, "uid": now.uid},
                )
            missing = await self._holds.missing(connection, deleted.uid)
            if missing:
                needed = _named(deleted.message, missing[0])
                raise FailedPrecondition(
                    f"{name} needs {needed}, which is deleted; undelete that first",
                    reason=Reason.RESOURCE_NOT_FOUND,
                    metadata={"name": name, "needed": needed},
                )
            await self._holds.wake(connection, deleted.uid)
            return (await self._deleted.restore(connection, deleted)).message

    async def purge(self, name: str, uid: str, etag: str) -> M:
        """Give up what had a name and was deleted last, or the one of a uid: it is gone soon, and for good.

        Raises:
            NotFound: there is none, or it was purged.
            Aborted: ETAG_MISMATCH.
            FailedPrecondition: WRONG_STATE, it is not deleted; RESOURCE_IN_USE: what may come back needs it.
        """
        async with self._database.transaction(makes_room=True) as connection:
            now = await self._rows.find(connection, name)
            if now is not None and uid in ("", now.uid):
                raise FailedPrecondition(
                    f"{name} must be deleted before it is purged; delete it",
                    metadata={"name": name, "uid": now.uid},
                )
            deleted = await self._deleted.find(connection, name, uid)
            require_etag(deleted, etag)
            await self._holds.require_free(connection, deleted, for_good=True)
            await self._deleted.give_up(connection, deleted.uid)
            # It cannot come back any more: what it needed may be purged with the next call.
            await self._holds.drop(connection, deleted.uid)
            return deleted.message


def _named(message: Any, uid: str) -> str:
    """Return the name of what a resource was made from, by its uid; the uid itself where it does not say."""
    names = [one.name for one in getattr(message, "references", ()) if one.uid == uid]
    return names[0] if names else f"the resource with uid {uid}"
