"""The families of the Data service put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.data import schema
from luthier.data.datasets import repository as dataset_rows
from luthier.data.datasets.service import DatasetService
from luthier.data.datasets.servicer import BuildVersionHandler, DatasetsServicer
from luthier.data.renderings import repository as rendering_rows
from luthier.data.renderings.service import Models, RenderingService
from luthier.data.renderings.servicer import RenderHandler, RenderingsServicer
from luthier.data.renderings.token_texts import TokenTexts
from luthier.data.servicer import registration
from luthier.data.shard_files import ShardReader
from luthier.data.uploads import repository as upload_rows
from luthier.data.uploads.service import UploadService
from luthier.data.uploads.servicer import UploadsServicer
from luthier.runtime.paging import PageTokens
from luthier.runtime.server import Registration
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.staging import Staging
from luthier.storage.stored import Rows
from luthier.work.elsewhere import Elsewhere
from luthier.work.families import Tasks
from luthier.work.handlers import TaskHandler
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.purging import Purged
from luthier.work.tasks import TaskKind

PURGED = (
    Purged(rows=rendering_rows.renderings(), parts=[schema.record_errors.c.owner]),
    Purged(rows=dataset_rows.versions(), parts=[schema.record_errors.c.owner]),
    Purged(rows=dataset_rows.datasets()),
    Purged(rows=upload_rows.uploads()),
)
"""What is purged, what holds others before those. Bytes that a crash left staged of an upload go by themselves."""


class Parts(Protocol):
    """What the process gives its service."""

    @property
    def database(self) -> Database:
        """The service's database."""

    @property
    def blobs(self) -> BlobStore:
        """The service's blobs."""

    @property
    def staging(self) -> Staging:
        """The uploads in progress."""

    @property
    def log(self) -> EventLog:
        """Events of its resources."""

    @property
    def queue(self) -> Tasks:
        """Work for its workers."""

    @property
    def elsewhere(self) -> Elsewhere:
        """What its resources need at other services."""

    @property
    def keeping(self) -> Keeping:
        """How long it keeps what is over."""

    @property
    def page_tokens(self) -> PageTokens:
        """Makes tokens of list calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataService:
    """How to add it to a server, who follows each kind of task, what others may hold, and the uploads.

    Those have work of their own beside calls, `finish_left`.
    """

    registration: Registration
    handlers: Mapping[TaskKind, TaskHandler]
    families: Mapping[str, Rows[Any, Any]]
    uploads: UploadService


def assemble(parts: Parts, models: Models, token_texts: TokenTexts, max_upload_bytes: int) -> DataService:
    """Put the service together on real adapters or a test's."""
    reader, keeping = ShardReader(parts.blobs), parts.keeping
    uploads = UploadService(parts.database, parts.staging, max_upload_bytes, keeping)
    datasets = DatasetService(parts.database, parts.log, parts.queue, uploads, keeping)
    renderings = RenderingService(
        parts.database, parts.log, parts.queue, datasets, models, parts.elsewhere, keeping
    )
    registered = registration(
        DatasetsServicer(datasets, reader, parts.page_tokens),
        UploadsServicer(uploads, parts.page_tokens),
        RenderingsServicer(renderings, reader, token_texts, parts.page_tokens),
    )
    handlers: Mapping[TaskKind, TaskHandler] = {
        TaskKind.BUILD_VERSION: BuildVersionHandler(datasets),
        TaskKind.RENDER: RenderHandler(renderings),
    }
    families: Mapping[str, Rows[Any, Any]] = {
        "versions": dataset_rows.versions(),
        "renderings": rendering_rows.renderings(),
    }
    return DataService(registration=registered, handlers=handlers, families=families, uploads=uploads)
