"""Renderings on the wire, and their side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.convert import enum_from_proto, split_from_proto
from luthier.data.names import RENDERING, check_name
from luthier.data.renderings.convert import (
    new_rendering,
    outcome_from_proto,
    refused_to_proto,
    render_spec,
    rendering_to_proto,
    row_to_proto,
)
from luthier.data.renderings.domain import View
from luthier.data.renderings.service import RenderingService
from luthier.data.renderings.token_texts import TokenTexts
from luthier.data.shard_files import LENGTH_COLUMNS, ROW_COLUMNS, ShardReader, in_split
from luthier.data.shards import check_start_row
from luthier.errors import FailedPrecondition, Failure
from luthier.runtime.names import require_project
from luthier.runtime.paging import PageTokens, page_size
from luthier.v1 import arrow_pb2, data_service_pb2, event_pb2, fine_tuning_job_pb2, rendering_pb2
from luthier.work.events import Entry
from luthier.work.listing import row_page_arguments
from luthier.work.log import EventLog
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]
PAGE_BYTES = 2 << 20
"""A page ends before it grows beyond this, whatever was asked for: clients accept 4 MiB a message."""


class RenderingsServicer:
    """The renderings' part of DataService: translates, delegates, translates."""

    def __init__(
        self,
        renderings: RenderingService,
        reader: ShardReader,
        token_texts: TokenTexts,
        log: EventLog,
        page_tokens: PageTokens,
        projects: Container[str],
    ) -> None:
        self._renderings = renderings
        self._reader = reader
        self._token_texts = token_texts
        self._log = log
        self._page_tokens = page_tokens
        self._projects = projects

    async def CreateRendering(
        self, request: data_service_pb2.CreateRenderingRequest, context: Context
    ) -> rendering_pb2.Rendering:
        """Queue a rendering."""
        require_project(request.parent, self._projects)
        wanted = new_rendering(request.rendering)
        return rendering_to_proto(await self._renderings.create(request.parent, request.rendering_id, wanted))

    async def GetRendering(
        self, request: data_service_pb2.GetRenderingRequest, context: Context
    ) -> rendering_pb2.Rendering:
        """Read one rendering."""
        check_name(RENDERING, request.name, self._projects)
        return rendering_to_proto(await self._renderings.get(request.name))

    async def ListRenderings(
        self, request: data_service_pb2.ListRenderingsRequest, context: Context
    ) -> data_service_pb2.ListRenderingsResponse:
        """Page through renderings; a page of great ones holds fewer."""
        require_project(request.parent, self._projects)
        asked = data_service_pb2.ListRenderingsRequest()
        asked.CopyFrom(request)
        while True:
            values, token = await self._renderings.list_page(asked, self._page_tokens)
            page = data_service_pb2.ListRenderingsResponse(
                renderings=[rendering_to_proto(value) for value in values], next_page_token=token
            )
            if len(values) <= 1 or page.ByteSize() <= PAGE_BYTES:
                return page
            asked.page_size = len(values) // 2

    async def CancelRendering(
        self, request: data_service_pb2.CancelRenderingRequest, context: Context
    ) -> rendering_pb2.Rendering:
        """Ask a rendering to stop."""
        check_name(RENDERING, request.name, self._projects)
        return rendering_to_proto(await self._renderings.cancel(request.name, request.etag))

    async def WatchRendering(
        self, request: data_service_pb2.WatchRenderingRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream a rendering's events."""
        check_name(RENDERING, request.name, self._projects)
        await self._renderings.get(request.name)
        async for event in self._log.watch(request.name, request.start_sequence):
            yield event

    async def ListRenderingErrors(
        self, request: data_service_pb2.ListRenderingErrorsRequest, context: Context
    ) -> data_service_pb2.ListRenderingErrorsResponse:
        """Page through records that could not be rendered."""
        check_name(RENDERING, request.parent, self._projects, field="parent")
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListRenderingErrors", (request.parent,), request.page_token
        )
        found = await self._renderings.list_errors(request.parent, start, limit + 1)
        token = self._page_tokens.encode((str(start + limit),), bound) if len(found) > limit else ""
        return data_service_pb2.ListRenderingErrorsResponse(
            errors=[refused_to_proto(error) for error in found[:limit]], next_page_token=token
        )

    async def PreviewRendering(
        self, request: data_service_pb2.PreviewRenderingRequest, context: Context
    ) -> data_service_pb2.PreviewRenderingResponse:
        """Show stored rows; a page of long rows holds fewer."""
        check_name(RENDERING, request.name, self._projects)
        split = split_from_proto(request.split)
        rendering = await self._renderings.ready(request.name)
        limit = page_size(request.page_size, default=5, maximum=100)
        scope = (request.name, str(request.split), str(request.unsupervised_only))
        start, bound = row_page_arguments(self._page_tokens, "PreviewRendering", scope, request.page_token)
        page = data_service_pb2.PreviewRenderingResponse()
        size_bytes = 0
        equals = {**in_split(split), **({"num_supervised": 0} if request.unsupervised_only else {})}
        async with aclosing(self._reader.rows(rendering.shards, ROW_COLUMNS, start, equals)) as rows:
            async for row in rows:
                texts = await self._token_texts.texts(rendering.tokenizer_blob, row["input_ids"])
                message = row_to_proto(row, texts)
                size_bytes += message.ByteSize()
                if len(page.rows) == limit or (page.rows and size_bytes > PAGE_BYTES):
                    page.next_page_token = self._page_tokens.encode((str(message.row),), bound)
                    break
                page.rows.append(message)
        return page

    async def ReadRendering(
        self, request: data_service_pb2.ReadRenderingRequest, context: Context
    ) -> AsyncIterator[arrow_pb2.ArrowChunk]:
        """Stream rows as Arrow."""
        check_name(RENDERING, request.name, self._projects)
        split = split_from_proto(request.split)
        wire = data_service_pb2.ReadRenderingRequest.View
        view = enum_from_proto(View, wire, "VIEW_", request.view, "view") or View.FULL
        columns = LENGTH_COLUMNS if view is View.LENGTHS else ROW_COLUMNS
        rendering = await self._renderings.ready(request.name)
        check_start_row(request.start_row, rendering.shards)
        wanted = in_split(split)
        found = self._reader.ipc_chunks(rendering.shards, columns, request.start_row, wanted)
        async with aclosing(found) as chunks:
            async for ipc, first_row, num_rows in chunks:
                yield arrow_pb2.ArrowChunk(ipc=ipc, first_row=first_row, num_rows=num_rows)


class RenderHandler:
    """Follows RENDER tasks."""

    def __init__(self, renderings: RenderingService) -> None:
        self._renderings = renderings

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to render."""
        rendering, version = await self._renderings.to_render(connection, task.subject)
        return render_spec(rendering, version)

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began."""
        await self._renderings.started(connection, task.subject)

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
        """Refuse: rendering has no checkpoints."""
        raise FailedPrecondition(f"a {task.kind} task has no checkpoints", metadata={"task": task.task_id})

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The rendering is READY."""
        await self._renderings.rendered(connection, task.subject, outcome_from_proto(result.render))

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The rendering is FAILED; the records that could not be rendered are kept."""
        known = result is not None and result.HasField("render")
        outcome = outcome_from_proto(result.render) if result is not None and known else None
        await self._renderings.failed(connection, task.subject, failure, outcome)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The rendering is CANCELLED."""
        await self._renderings.cancelled(connection, task.subject)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """Another worker will begin anew."""
        await self._renderings.lost(connection, task.subject)
