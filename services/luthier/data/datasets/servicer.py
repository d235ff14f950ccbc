"""Datasets, versions and records on the wire, and the versions' side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.datasets.records import stored_record
from luthier.data.datasets.rules import RESULT_LIMITS, State
from luthier.data.datasets.service import DatasetService
from luthier.data.names import DATASET, VERSION
from luthier.data.shard_files import ID_COLUMNS, RECORD_COLUMNS, ShardReader, in_split
from luthier.data.shards import check_start_row
from luthier.errors import Failure
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens, page_size
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate
from luthier.v1 import arrow_pb2, data_service_pb2, dataset_pb2
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.listing import PAGE_BYTES, row_page_arguments
from luthier.work.standard_methods import StandardMethods
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class DatasetsServicer:
    """The datasets' part of DataService."""

    def __init__(
        self,
        datasets: DatasetService,
        reader: ShardReader,
        page_tokens: PageTokens,
    ) -> None:
        self._datasets = datasets
        self._reader = reader
        self._page_tokens = page_tokens
        standard = StandardMethods(pattern=DATASET, tokens=page_tokens)
        self.GetDataset = standard.get(datasets.get_dataset)
        self.ListDatasets = standard.list(
            datasets.list_datasets,
            lambda found, token: data_service_pb2.ListDatasetsResponse(datasets=found, next_page_token=token),
        )
        self.DeleteDataset = standard.delete(datasets.delete_dataset)
        self.UndeleteDataset = standard.undelete(datasets.undeleting)
        self.PurgeDataset = standard.purge(datasets.undeleting)
        standard = StandardMethods(pattern=VERSION, tokens=page_tokens)
        self.GetDatasetVersion = standard.get(datasets.versions.message)
        self.ListDatasetVersions = standard.list(
            datasets.list_versions,
            lambda found, token: data_service_pb2.ListDatasetVersionsResponse(
                dataset_versions=found, next_page_token=token
            ),
        )
        self.CancelDatasetVersion = standard.cancel(datasets.versions.cancel)
        self.DeleteDatasetVersion = standard.delete(datasets.versions.delete)
        self.UndeleteDatasetVersion = standard.undelete(datasets.versions.undeleting)
        self.PurgeDatasetVersion = standard.purge(datasets.versions.undeleting)
        self.WatchDatasetVersion = standard.watch(datasets.versions.watch)

    async def CreateDataset(
        self, request: data_service_pb2.CreateDatasetRequest, context: Context
    ) -> dataset_pb2.Dataset:
        """Create an empty dataset."""
        PROJECT.parse(request.parent, field="parent")
        return await self._datasets.create_dataset(request)

    async def CreateDatasetVersion(
        self, request: data_service_pb2.CreateDatasetVersionRequest, context: Context
    ) -> dataset_pb2.DatasetVersion:
        """Queue the building of a version."""
        DATASET.parse(request.parent, field="parent")
        return await self._datasets.create_version(request)

    async def ListDatasetVersionErrors(
        self, request: data_service_pb2.ListDatasetVersionErrorsRequest, context: Context
    ) -> data_service_pb2.ListDatasetVersionErrorsResponse:
        """Page through bad records."""
        VERSION.parse(request.parent, field="parent")
        uid = (await self._datasets.versions.read(request.parent)).uid
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListDatasetVersionErrors", (uid,), request.page_token
        )
        found = await self._datasets.list_errors(uid, start, limit + 1)
        token = self._page_tokens.encode((str(start + limit),), bound) if len(found) > limit else ""
        return data_service_pb2.ListDatasetVersionErrorsResponse(errors=found[:limit], next_page_token=token)

    async def ListRecords(
        self, request: data_service_pb2.ListRecordsRequest, context: Context
    ) -> data_service_pb2.ListRecordsResponse:
        """Page through records; a page of great records holds fewer."""
        VERSION.parse(request.parent, field="parent")
        version = await self._datasets.ready_version(request.parent)
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListRecords", (version.uid, str(request.split)), request.page_token
        )
        page = data_service_pb2.ListRecordsResponse()
        size_bytes = 0
        found = self._reader.rows(version.private.shards, RECORD_COLUMNS, start, in_split(request.split))
        async with aclosing(found) as rows:
            async for row in rows:
                record = stored_record(row)
                size_bytes += record.ByteSize()
                if len(page.records) == limit or (page.records and size_bytes > PAGE_BYTES):
                    page.next_page_token = self._page_tokens.encode((str(record.row),), bound)
                    break
                page.records.append(record)
        return page

    async def ReadRecords(
        self, request: data_service_pb2.ReadRecordsRequest, context: Context
    ) -> AsyncIterator[arrow_pb2.ArrowChunk]:
        """Stream records as Arrow."""
        VERSION.parse(request.name)
        version = await self._datasets.ready_version(request.name, request.uid)
        check_start_row(request.start_row, version.private.shards)
        wanted = in_split(request.split)
        columns = ID_COLUMNS if request.ids_only else RECORD_COLUMNS
        found = self._reader.ipc_chunks(version.private.shards, columns, request.start_row, wanted)
        async with aclosing(found) as chunks:
            async for ipc, first_row, num_rows in chunks:
                yield arrow_pb2.ArrowChunk(ipc=ipc, first_row=first_row, num_rows=num_rows)


class BuildVersionHandler(FamilyTasks[DatasetVersion, DatasetVersionPrivate]):
    """Follows BUILD_VERSION tasks."""

    result_limits = RESULT_LIMITS

    def __init__(self, datasets: DatasetService) -> None:
        states = TaskStates(
            queued=State.STATE_QUEUED, begun=State.STATE_BUILDING, cancelled=State.STATE_CANCELLED
        )
        super().__init__(datasets.versions, states)
        self._datasets = datasets

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to build."""
        version = await self._datasets.versions.of_uid(connection, task.uid)
        spec = task_pb2.BuildVersionSpec(
            invalid_record_policy=version.message.invalid_record_policy,
            split_settings=version.message.split_settings,
        )
        for source, file in zip(version.message.sources, version.private.source_files, strict=True):
            spec.sources.add(filename=source.filename, file=file, split=source.split, format=source.format)
        return task_pb2.Task(build_version=spec)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The version is READY."""
        await self._datasets.version_built(connection, task.uid, result.build_version)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The version is FAILED; its statistics and errors are kept."""
        known = result.build_version if result is not None and result.HasField("build_version") else None
        await self._datasets.version_failed(connection, task.uid, failure, known)
