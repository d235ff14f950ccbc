"""What can be done with datasets and versions."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.datasets import repository
from luthier.data.datasets.domain import (
    Dataset,
    DatasetState,
    DatasetVersion,
    NewVersion,
    RecordError,
    Source,
    VersionOutcome,
    VersionState,
    version_violations,
)
from luthier.data.names import UPLOAD
from luthier.errors import Failure, FieldViolation, InvalidArgument
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.runtime.names import check_id, new_id, project_of, same_project
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.resources import require_etag
from luthier.work.events import Entry, StateChanged
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import NewTask, Task, TaskKind


class UploadedFile(Protocol):
    """A complete upload."""

    @property
    def filename(self) -> str:
        """Name of the file."""

    @property
    def digest(self) -> str:
        """Its blob."""

    @property
    def persisted_size_bytes(self) -> int:
        """Its size."""


class Uploads(Protocol):
    """Where versions find their files."""

    async def completed(self, connection: AsyncConnection, name: str) -> UploadedFile:
        """Return a complete upload. Raises NotFound, FailedPrecondition UPLOAD_INCOMPLETE."""
        ...


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...

    async def request_cancel(self, connection: AsyncConnection, subject: str) -> None:
        """Stop the task of a resource in the caller's transaction."""
        ...


def _refuse(violations: Sequence[FieldViolation]) -> None:
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _now() -> datetime:
    return datetime.now(UTC)


class DatasetService:
    """Use cases of datasets and versions. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        uploads: Uploads,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._database = database
        self._log = log
        self._tasks = tasks
        self._uploads = uploads
        self._clock = clock
        self._datasets = repository.datasets()
        self._versions = repository.versions()
        self._errors = repository.VersionErrors()

    async def create_dataset(
        self, parent: str, dataset_id: str, display_name: str, labels: Mapping[str, str]
    ) -> Dataset:
        """Create an empty dataset; without an id one is made. Raises InvalidArgument, AlreadyExists."""
        _refuse(
            [
                *display_name_violations(display_name, "dataset.display_name"),
                *label_violations(labels, "dataset.labels"),
            ]
        )
        chosen = check_id(dataset_id, field="dataset_id") if dataset_id else new_id("dataset")
        now = self._clock()
        dataset = Dataset(
            name=f"{parent}/datasets/{chosen}",
            uid=str(uuid.uuid4()),
            state=DatasetState.ACTIVE,
            labels=labels,
            create_time=now,
            update_time=now,
            revision=1,
            display_name=display_name,
        )
        async with self._database.transaction() as connection:
            await self._datasets.insert(connection, dataset)
        return dataset

    async def get_dataset(self, name: str) -> Dataset:
        """Return a dataset. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._datasets.get(connection, name)

    async def list_datasets(
        self, request: ListRequest, tokens: PageTokens
    ) -> tuple[tuple[Dataset, ...], str]:
        """Return a page of a project's datasets and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._datasets, tokens, request, filters=("labels",))

    async def create_version(self, parent: str, version_id: str, wanted: NewVersion) -> DatasetVersion:
        """Queue the building of a version of the dataset `parent`.

        Raises InvalidArgument (also CROSS_PROJECT_REFERENCE), NotFound, AlreadyExists, FailedPrecondition
        UPLOAD_INCOMPLETE, ResourceExhausted DISK_FULL.
        """
        _refuse(
            [
                *version_violations(wanted),
                *label_violations(wanted.labels, "dataset_version.labels"),
            ]
        )
        for index, source in enumerate(wanted.sources):
            path = f"dataset_version.sources[{index}].upload"
            UPLOAD.parse(source.upload, field=path)
            same_project(parent, source.upload, path)
        chosen = check_id(version_id, field="dataset_version_id") if version_id else new_id("version")
        self._database.disk.require_room()
        async with self._database.transaction() as connection:
            await self._datasets.get(connection, parent)
            now = self._clock()
            version = DatasetVersion(
                name=f"{parent}/versions/{chosen}",
                uid=str(uuid.uuid4()),
                state=VersionState.QUEUED,
                labels=wanted.labels,
                create_time=now,
                update_time=now,
                revision=1,
                sources=tuple([await self._found(connection, source) for source in wanted.sources]),
                invalid_record_policy=wanted.invalid_record_policy,
                split_settings=wanted.split_settings,
            )
            await self._versions.insert(connection, version)
            await self._announce(connection, version)
            new = NewTask(kind=TaskKind.BUILD_VERSION, subject=version.name, project=project_of(version.name))
            await self._tasks.enqueue(connection, new)
        return version

    async def get_version(self, name: str) -> DatasetVersion:
        """Return a version. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._versions.get(connection, name)

    async def ready_version(self, name: str) -> DatasetVersion:
        """Return a READY version. Raises NotFound, FailedPrecondition WRONG_STATE."""
        return (await self.get_version(name)).require_ready()

    async def list_versions(
        self, request: ListRequest, tokens: PageTokens
    ) -> tuple[tuple[DatasetVersion, ...], str]:
        """Return a page of versions and the next page's token. Raises InvalidArgument, NotFound."""
        await self.get_dataset(request.parent)
        return await list_page(self._database, self._versions, tokens, request)

    async def cancel_version(self, name: str, etag: str) -> DatasetVersion:
        """Ask a version to stop; one that has ended or is stopping stays as it is.

        Raises NotFound, Aborted ETAG_MISMATCH.
        """
        async with self._database.transaction(makes_room=True) as connection:
            version = await self._versions.get(connection, name)
            require_etag(version, etag)
            if version.final or version.state is VersionState.CANCELLING:
                return version
            await self._save(connection, version.cancelling())
            await self._tasks.request_cancel(connection, name)
            return await self._versions.get(connection, name)

    async def list_errors(self, name: str, start: int, limit: int) -> Sequence[RecordError]:
        """Return at most `limit` bad records of a version from position `start` on. Raises NotFound."""
        async with self._database.reading() as connection:
            await self._versions.get(connection, name)
            return await self._errors.page(connection, name, start, limit)

    async def stored(self, connection: AsyncConnection, name: str) -> DatasetVersion:
        """Return a version as the transaction sees it. Raises NotFound."""
        return await self._versions.get(connection, name)

    async def version_started(self, connection: AsyncConnection, name: str) -> None:
        """A worker began to build."""
        version = await self._versions.get(connection, name)
        await self._save(connection, version.building())

    async def version_lost(self, connection: AsyncConnection, name: str) -> None:
        """The worker was lost; another will begin anew."""
        version = await self._versions.get(connection, name)
        await self._save(connection, version.queued_again())

    async def version_built(self, connection: AsyncConnection, name: str, outcome: VersionOutcome) -> None:
        """The version is READY. Raises InvalidArgument for an outcome that contradicts itself."""
        version = await self._versions.get(connection, name)
        await self._errors.add(connection, name, outcome.errors)
        await self._save(connection, version.built(outcome))

    async def version_failed(
        self, connection: AsyncConnection, name: str, failure: Failure, outcome: VersionOutcome | None
    ) -> None:
        """The version is FAILED; `outcome` is what is known all the same."""
        version = await self._versions.get(connection, name)
        await self._errors.add(connection, name, outcome.errors if outcome else ())
        await self._save(connection, version.failed(failure, outcome))

    async def version_cancelled(self, connection: AsyncConnection, name: str) -> None:
        """The version stopped on request."""
        version = await self._versions.get(connection, name)
        await self._save(connection, version.cancelled())

    async def _found(self, connection: AsyncConnection, source: Source) -> Source:
        file = await self._uploads.completed(connection, source.upload)
        return replace(
            source, filename=file.filename, digest=file.digest, size_bytes=file.persisted_size_bytes
        )

    async def _save(self, connection: AsyncConnection, version: DatasetVersion) -> None:
        await self._announce(connection, await self._versions.update(connection, version))

    async def _announce(self, connection: AsyncConnection, version: DatasetVersion) -> None:
        change = StateChanged(state=version.state, failure=version.failure, final=version.final)
        await self._log.append(connection, version.name, [Entry(payload=change)])
