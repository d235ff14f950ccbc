"""What can be done with datasets and versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.datasets import repository, rules
from luthier.data.datasets.rules import State
from luthier.data.names import UPLOAD
from luthier.data.record_errors import add_errors, page_of_errors
from luthier.errors import Failure
from luthier.errors.status import failure_to_status
from luthier.runtime.names import child_name
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.stored import Stored, require_etag
from luthier.stored.v1.data_pb2 import DatasetPrivate, DatasetVersionPrivate, UploadPrivate
from luthier.v1.data_service_pb2 import CreateDatasetRequest, CreateDatasetVersionRequest
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion, RecordError
from luthier.v1.upload_pb2 import Upload
from luthier.work.families import Family, Needs, Tasks, Work, require_state
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import TaskKind
from luthier.work.undeleting import Undeleting
from luthier.worker.v1.task_pb2 import BuildVersionResult

StoredVersion = Stored[DatasetVersion, DatasetVersionPrivate]


class Uploads(Protocol):
    """Where versions find their files."""

    async def completed(self, connection: AsyncConnection, name: str) -> Stored[Upload, UploadPrivate]:
        """Return a complete upload. Raises NotFound, FailedPrecondition UPLOAD_INCOMPLETE."""
        ...


class DatasetService:
    """Use cases of datasets and versions. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        uploads: Uploads,
        keeping: Keeping,
    ) -> None:
        self._database = database
        self._uploads = uploads
        self._datasets = repository.datasets()
        self.undeleting = Undeleting(self._datasets, database, keeping)
        self._versions = repository.versions()
        lifecycle = Lifecycle(DatasetVersion.State.DESCRIPTOR, rules.TRANSITIONS)
        self.versions = Family(self._versions, lifecycle, database, log, tasks, keeping)

    async def create_dataset(self, request: CreateDatasetRequest) -> Dataset:
        """Create an empty dataset; without an id one is made. Raises InvalidArgument, AlreadyExists."""
        rules.check_dataset(request.dataset)
        dataset = Dataset()
        dataset.CopyFrom(request.dataset)
        dataset.name = child_name(
            request.parent, "datasets", request.dataset_id, field="dataset_id", prefix="dataset"
        )
        async with self._database.transaction() as connection:
            return (await self._datasets.insert(connection, dataset, DatasetPrivate())).message

    async def delete_dataset(self, name: str, etag: str) -> Dataset:
        """Delete a dataset without versions. Raises NotFound, Aborted, FailedPrecondition RESOURCE_IN_USE."""
        async with self._database.transaction(makes_room=True) as connection:
            dataset = await self._datasets.get(connection, name)
            require_etag(dataset, etag)
            return (await self.undeleting.delete(connection, dataset)).message

    async def get_dataset(self, name: str) -> Dataset:
        """Return a dataset. Raises NotFound."""
        return (await self._datasets.read(self._database, name)).message

    async def list_datasets(
        self, request: ListRequest, tokens: PageTokens
    ) -> tuple[tuple[Dataset, ...], str]:
        """Return a page of a project's datasets and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._datasets, tokens, request, filters=("labels",))

    async def create_version(self, request: CreateDatasetVersionRequest) -> DatasetVersion:
        """Queue the building of a version of a dataset.

        Raises InvalidArgument, NotFound, AlreadyExists, FailedPrecondition
        UPLOAD_INCOMPLETE, ResourceExhausted DISK_FULL.
        """
        rules.check_version(request.dataset_version)
        version = rules.resolved(request.dataset_version)
        for index, source in enumerate(version.sources):
            UPLOAD.parse(source.upload, field=f"dataset_version.sources[{index}].upload")
        chosen_id = request.dataset_version_id
        version.name = child_name(
            request.parent, "versions", chosen_id, field="dataset_version_id", prefix="version"
        )
        self._database.disk.require_room()
        private = DatasetVersionPrivate()
        async with self._database.transaction() as connection:
            dataset = await self._datasets.get(connection, request.parent)
            version.references.add(name=request.parent, uid=dataset.uid)
            uploads = []
            for source in version.sources:
                upload = await self._uploads.completed(connection, source.upload)
                uploads.append(upload.uid)
                digest = upload.private.sha256
                version.references.add(name=source.upload, uid=upload.uid, digest=digest)
                source.filename = upload.message.filename
                private.source_files.add(
                    path=upload.message.filename,
                    sha256=upload.private.sha256,
                    size_bytes=upload.message.persisted_size_bytes,
                )
            work = Work(kind=TaskKind.BUILD_VERSION)
            needs = Needs(until_end=uploads, lasting=(dataset.uid,))
            return (await self.versions.add(connection, version, private, work, needs)).message

    async def ready_version(self, name: str, uid: str = "") -> StoredVersion:
        """Return a READY version, that of a uid if one is given. Raises NotFound, FailedPrecondition WRONG_STATE."""
        return require_state(await self.versions.read(name, uid), State.STATE_READY, self.versions.lifecycle)

    async def require(self, connection: AsyncConnection, uid: str) -> StoredVersion:
        """Return a version as the transaction sees it. Raises NotFound."""
        return await self.versions.of_uid(connection, uid)

    async def list_versions(
        self, request: ListRequest, tokens: PageTokens
    ) -> tuple[tuple[DatasetVersion, ...], str]:
        """Return a page of versions and the next page's token. Raises InvalidArgument, NotFound."""
        uid = (await self._datasets.read(self._database, request.parent)).uid
        return await list_page(self._database, self._versions, tokens, request, parent_uid=uid)

    async def list_errors(self, uid: str, start: int, limit: int) -> Sequence[RecordError]:
        """Return at most `limit` bad records of the version of a uid from position `start` on."""
        async with self._database.reading() as connection:
            return await page_of_errors(connection, uid, start, limit)

    async def version_built(self, connection: AsyncConnection, uid: str, result: BuildVersionResult) -> None:
        """The version is READY. Raises InvalidArgument for a result that contradicts itself."""
        version = await self.versions.of_uid(connection, uid)
        await add_errors(connection, version.uid, result.errors)
        private = version.copy_private()
        private.shards.extend(result.shards)
        changed = rules.built(version.message, result)
        await self.versions.move(connection, version, State.STATE_READY, changed=changed, private=private)

    async def version_failed(
        self, connection: AsyncConnection, uid: str, failure: Failure, result: BuildVersionResult | None
    ) -> None:
        """The version is FAILED; `result` is what is known all the same."""
        version = await self.versions.of_uid(connection, uid)
        changed = version.copy()
        if result is not None:
            await add_errors(connection, version.uid, result.errors)
            changed = rules.with_findings(version.message, result)
        changed.error.CopyFrom(failure_to_status(failure))
        await self.versions.move(connection, version, State.STATE_FAILED, changed=changed)
