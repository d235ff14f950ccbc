"""What needs which blob, read from the resources themselves: what the rows of `storage.blob_refs` must say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.stored import Rows

_ROWS_AT_ONCE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One blob that something needs.

    Attributes:
        owner: as the row of references must say.
        name: what needs it, in words for people: the name of a resource, with what of it.
        digest: of the blob.
    """

    owner: str
    name: str
    digest: str


Needs = Callable[[AsyncConnection], AsyncIterator[Need]]
"""Yields all that a service's resources need, as one transaction sees it."""


async def needs_of(connection: AsyncConnection, *families: Rows[Any, Any]) -> AsyncIterator[Need]:
    """Yield what the resources of some families need that are not deleted, less what their parts do."""
    for rows in families:
        after = ""
        while found := await rows.all(connection, after, _ROWS_AT_ONCE):
            for stored, digest in ((one, digest) for one in found for digest in rows.blobs_of(one)):
                yield Need(owner=stored.uid, name=stored.message.name, digest=digest)
            after = found[-1].uid
