"""Datasets, versions and records on the wire, and the versions' side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.convert import split_from_proto
from luthier.data.datasets.convert import (
    build_spec,
    dataset_to_proto,
    error_to_proto,
    new_version,
    outcome_from_proto,
    record_to_proto,
    version_to_proto,
)
from luthier.data.datasets.service import DatasetService
from luthier.data.names import DATASET, VERSION, check_name
from luthier.data.shard_files import ID_COLUMNS, RECORD_COLUMNS, ShardReader, in_split
from luthier.data.shards import check_start_row
from luthier.errors import FailedPrecondition, Failure
from luthier.runtime.names import require_project
from luthier.runtime.paging import PageTokens, page_size
from luthier.v1 import arrow_pb2, data_service_pb2, dataset_pb2, event_pb2, fine_tuning_job_pb2
from luthier.work.events import Entry
from luthier.work.listing import row_page_arguments
from luthier.work.log import EventLog
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]
PAGE_BYTES = 2 << 20
"""A page ends before it grows beyond this, whatever was asked for: clients accept 4 MiB a message."""


class DatasetsServicer:
    """The datasets' part of DataService: translates, delegates, translates."""

    def __init__(
        self,
        datasets: DatasetService,
        reader: ShardReader,
        log: EventLog,
        page_tokens: PageTokens,
        projects: Container[str],
    ) -> None:
        self._datasets = datasets
        self._reader = reader
        self._log = log
        self._page_tokens = page_tokens
        self._projects = projects

    async def CreateDataset(
        self, request: data_service_pb2.CreateDatasetRequest, context: Context
    ) -> dataset_pb2.Dataset:
        """Create an empty dataset."""
        require_project(request.parent, self._projects)
        wanted = request.dataset
        created = await self._datasets.create_dataset(
            request.parent, request.dataset_id, wanted.display_name, dict(wanted.labels)
        )
        return dataset_to_proto(created)

    async def GetDataset(
        self, request: data_service_pb2.GetDatasetRequest, context: Context
    ) -> dataset_pb2.Dataset:
        """Read one dataset."""
        check_name(DATASET, request.name, self._projects)
        return dataset_to_proto(await self._datasets.get_dataset(request.name))

    async def ListDatasets(
        self, request: data_service_pb2.ListDatasetsRequest, context: Context
    ) -> data_service_pb2.ListDatasetsResponse:
        """Page through datasets."""
        require_project(request.parent, self._projects)
        values, token = await self._datasets.list_datasets(request, self._page_tokens)
        return data_service_pb2.ListDatasetsResponse(
            datasets=[dataset_to_proto(value) for value in values], next_page_token=token
        )

    async def CreateDatasetVersion(
        self, request: data_service_pb2.CreateDatasetVersionRequest, context: Context
    ) -> dataset_pb2.DatasetVersion:
        """Queue the building of a version."""
        check_name(DATASET, request.parent, self._projects, field="parent")
        wanted = new_version(request.dataset_version)
        created = await self._datasets.create_version(request.parent, request.dataset_version_id, wanted)
        return version_to_proto(created)

    async def GetDatasetVersion(
        self, request: data_service_pb2.GetDatasetVersionRequest, context: Context
    ) -> dataset_pb2.DatasetVersion:
        """Read one version."""
        check_name(VERSION, request.name, self._projects)
        return version_to_proto(await self._datasets.get_version(request.name))

    async def ListDatasetVersions(
        self, request: data_service_pb2.ListDatasetVersionsRequest, context: Context
    ) -> data_service_pb2.ListDatasetVersionsResponse:
        """Page through versions."""
        check_name(DATASET, request.parent, self._projects, field="parent")
        values, token = await self._datasets.list_versions(request, self._page_tokens)
        return data_service_pb2.ListDatasetVersionsResponse(
            dataset_versions=[version_to_proto(value) for value in values], next_page_token=token
        )

    async def CancelDatasetVersion(
        self, request: data_service_pb2.CancelDatasetVersionRequest, context: Context
    ) -> dataset_pb2.DatasetVersion:
        """Ask a version to stop."""
        check_name(VERSION, request.name, self._projects)
        return version_to_proto(await self._datasets.cancel_version(request.name, request.etag))

    async def WatchDatasetVersion(
        self, request: data_service_pb2.WatchDatasetVersionRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream a version's events."""
        check_name(VERSION, request.name, self._projects)
        await self._datasets.get_version(request.name)
        async for event in self._log.watch(request.name, request.start_sequence):
            yield event

    async def ListDatasetVersionErrors(
        self, request: data_service_pb2.ListDatasetVersionErrorsRequest, context: Context
    ) -> data_service_pb2.ListDatasetVersionErrorsResponse:
        """Page through bad records."""
        check_name(VERSION, request.parent, self._projects, field="parent")
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListDatasetVersionErrors", (request.parent,), request.page_token
        )
        found = await self._datasets.list_errors(request.parent, start, limit + 1)
        token = self._page_tokens.encode((str(start + limit),), bound) if len(found) > limit else ""
        return data_service_pb2.ListDatasetVersionErrorsResponse(
            errors=[error_to_proto(error) for error in found[:limit]], next_page_token=token
        )

    async def ListRecords(
        self, request: data_service_pb2.ListRecordsRequest, context: Context
    ) -> data_service_pb2.ListRecordsResponse:
        """Page through records; a page of great records holds fewer."""
        check_name(VERSION, request.parent, self._projects, field="parent")
        split = split_from_proto(request.split)
        version = await self._datasets.ready_version(request.parent)
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListRecords", (request.parent, str(request.split)), request.page_token
        )
        page = data_service_pb2.ListRecordsResponse()
        size_bytes = 0
        found = self._reader.rows(version.shards, RECORD_COLUMNS, start, in_split(split))
        async with aclosing(found) as rows:
            async for row in rows:
                record = record_to_proto(row)
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
        check_name(VERSION, request.name, self._projects)
        split = split_from_proto(request.split)
        version = await self._datasets.ready_version(request.name)
        check_start_row(request.start_row, version.shards)
        wanted = in_split(split)
        columns = ID_COLUMNS if request.ids_only else RECORD_COLUMNS
        found = self._reader.ipc_chunks(version.shards, columns, request.start_row, wanted)
        async with aclosing(found) as chunks:
            async for ipc, first_row, num_rows in chunks:
                yield arrow_pb2.ArrowChunk(ipc=ipc, first_row=first_row, num_rows=num_rows)


class BuildVersionHandler:
    """Follows BUILD_VERSION tasks."""

    def __init__(self, datasets: DatasetService) -> None:
        self._datasets = datasets

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to build."""
        return build_spec(await self._datasets.stored(connection, task.subject))

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began."""
        await self._datasets.version_started(connection, task.subject)

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        entries: Sequence[Entry],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        """Nothing of a report is kept but its events."""

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Refuse: building has no checkpoints."""
        raise no_checkpoints(task)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The version is READY."""
        outcome = outcome_from_proto(result.build_version)
        await self._datasets.version_built(connection, task.subject, outcome)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The version is FAILED; its statistics and errors are kept."""
        known = result is not None and result.HasField("build_version")
        outcome = outcome_from_proto(result.build_version) if result is not None and known else None
        await self._datasets.version_failed(connection, task.subject, failure, outcome)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The version is CANCELLED."""
        await self._datasets.version_cancelled(connection, task.subject)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """Another worker will begin anew."""
        await self._datasets.version_lost(connection, task.subject)


def no_checkpoints(task: Task) -> FailedPrecondition:
    """Return the error for a checkpoint of a task that has none."""
    return FailedPrecondition(f"a {task.kind} task has no checkpoints", metadata={"task": task.task_id})
