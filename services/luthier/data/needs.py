"""What needs which blob of the Data service, and holds what it is made from."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.datasets import repository as datasets
from luthier.data.renderings import repository as renderings
from luthier.data.uploads import repository as uploads
from luthier.work.blob_needs import Need, needs_of
from luthier.work.hold_check import Holder, made_from

HOLDERS = (
    Holder(rows=datasets.versions(), needed=made_from),
    Holder(rows=renderings.renderings(), needed=made_from),
)
"""Whose resources hold others."""


def needs(connection: AsyncConnection) -> AsyncIterator[Need]:
    """Yield all that versions, uploads and renderings need, deleted ones too."""
    return needs_of(connection, datasets.versions(), uploads.uploads(), renderings.renderings())
