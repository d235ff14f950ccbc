"""What needs which blob of the Data service."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.datasets import repository as datasets
from luthier.data.renderings import repository as renderings
from luthier.data.uploads import repository as uploads
from luthier.work.blob_needs import Need, needs_of


def needs(connection: AsyncConnection) -> AsyncIterator[Need]:
    """Yield all that versions, uploads and renderings need, deleted ones too."""
    return needs_of(connection, datasets.versions(), uploads.uploads(), renderings.renderings())
