"""Renderings on the wire, and their side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.names import RENDERING
from luthier.data.renderings.rules import RESULT_LIMITS, State
from luthier.data.renderings.service import RenderingService
from luthier.data.renderings.token_texts import TokenTexts
from luthier.data.shard_files import LENGTH_COLUMNS, PROMPT_COLUMNS, ROW_COLUMNS, ShardReader, in_split
from luthier.data.shards import check_start_row
from luthier.data.splits import split_named
from luthier.errors import Failure
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens, page_size
from luthier.stored.v1.data_pb2 import RenderingPrivate
from luthier.v1 import arrow_pb2, data_service_pb2, rendering_pb2
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.listing import PAGE_BYTES, row_page_arguments
from luthier.work.standard_methods import StandardMethods
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class RenderingsServicer:
    """The renderings' part of DataService."""

    def __init__(
        self,
        renderings: RenderingService,
        reader: ShardReader,
        token_texts: TokenTexts,
        page_tokens: PageTokens,
    ) -> None:
        self._renderings = renderings
        self._reader = reader
        self._token_texts = token_texts
        self._page_tokens = page_tokens
        family = renderings.family
        standard = StandardMethods(pattern=RENDERING, tokens=page_tokens)
        self.GetRendering = standard.get(family.message)
        self.ListRenderings = standard.list(
            family.page,
            lambda found, token: data_service_pb2.ListRenderingsResponse(
                renderings=found, next_page_token=token
            ),
        )
        self.CancelRendering = standard.cancel(family.cancel)
        self.DeleteRendering = standard.delete(family.delete)
        self.UndeleteRendering = standard.undelete(family.undeleting)
        self.PurgeRendering = standard.purge(family.undeleting)
        self.WatchRendering = standard.watch(family.watch)

    async def CreateRendering(
        self, request: data_service_pb2.CreateRenderingRequest, context: Context
    ) -> rendering_pb2.Rendering:
        """Queue a rendering."""
        PROJECT.parse(request.parent, field="parent")
        return await self._renderings.create(request)

    async def ListRenderingErrors(
        self, request: data_service_pb2.ListRenderingErrorsRequest, context: Context
    ) -> data_service_pb2.ListRenderingErrorsResponse:
        """Page through records that could not be rendered."""
        RENDERING.parse(request.parent, field="parent")
        uid = (await self._renderings.family.read(request.parent)).uid
        limit = page_size(request.page_size)
        start, bound = row_page_arguments(
            self._page_tokens, "ListRenderingErrors", (uid,), request.page_token
        )
        found = await self._renderings.list_errors(uid, start, limit + 1)
        token = self._page_tokens.encode((str(start + limit),), bound) if len(found) > limit else ""
        return data_service_pb2.ListRenderingErrorsResponse(errors=found[:limit], next_page_token=token)

    async def PreviewRendering(
        self, request: data_service_pb2.PreviewRenderingRequest, context: Context
    ) -> data_service_pb2.PreviewRenderingResponse:
        """Show stored rows; a page of long rows holds fewer, and may end inside a unit."""
        RENDERING.parse(request.name)
        rendering = await self._renderings.ready(request.name)
        limit = page_size(request.page_size, default=5, maximum=100)
        scope = (rendering.uid, str(request.split), str(request.unsupervised_only))
        start, bound = row_page_arguments(self._page_tokens, "PreviewRendering", scope, request.page_token)
        page = data_service_pb2.PreviewRenderingResponse()
        size_bytes = 0
        equals = {**in_split(request.split), **({"num_supervised": 0} if request.unsupervised_only else {})}
        num_units = 0
        first: Mapping[str, Any] = {}
        async with aclosing(self._reader.rows(rendering.private.shards, ROW_COLUMNS, start, equals)) as rows:
            async for row in rows:
                begins = row["unit"] != first.get("unit")
                first = row if begins else first
                num_units += begins
                texts = await self._token_texts.texts(rendering.private.tokenizer_sha256, row["input_ids"])
                message = _rendered_row(row, texts, 0 if begins else _num_shared(first, row))
                size_bytes += message.ByteSize()
                if num_units > limit or (page.rows and size_bytes > PAGE_BYTES):
                    page.next_page_token = self._page_tokens.encode((str(message.row),), bound)
                    break
                page.rows.append(message)
        return page

    async def ReadRendering(
        self, request: data_service_pb2.ReadRenderingRequest, context: Context
    ) -> AsyncIterator[arrow_pb2.ArrowChunk]:
        """Stream rows as Arrow."""
        RENDERING.parse(request.name)
        lengths_only = request.view == data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
        rendering = await self._renderings.ready(request.name, request.uid)
        columns = LENGTH_COLUMNS if lengths_only else _full_columns(rendering.message.kind)
        check_start_row(request.start_row, rendering.private.shards)
        wanted = in_split(request.split)
        found = self._reader.ipc_chunks(rendering.private.shards, columns, request.start_row, wanted)
        async with aclosing(found) as chunks:
            async for ipc, first_row, num_rows in chunks:
                yield arrow_pb2.ArrowChunk(ipc=ipc, first_row=first_row, num_rows=num_rows)


def _rendered_row(row: Mapping[str, Any], texts: Sequence[str], num_shared: int) -> rendering_pb2.RenderedRow:
    """Return a stored row with the text of each of its tokens but the first `num_shared`.

    `row` has the columns `ROW_COLUMNS`.
    """
    tokens = zip(row["input_ids"], texts, row["loss_mask"], strict=True)
    return rendering_pb2.RenderedRow(
        row=row["row"],
        record_id=row["record_id"],
        split=split_named(row["split"]),
        filename=row["filename"],
        line=row["line"],
        tokens=[
            rendering_pb2.RenderedToken(token_id=token_id, text=text, supervised=supervised)
            for token_id, text, supervised in islice(tokens, num_shared, None)
        ],
        unit=row["unit"],
        role=row["role"],
        num_shared_tokens=num_shared,
    )


def _num_shared(first: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    """Return how many tokens a row of a unit begins with as its first row does, up to where one of them is learnt."""
    shared = 0
    for one, other, learnt, also in zip(
        first["input_ids"], row["input_ids"], first["loss_mask"], row["loss_mask"], strict=False
    ):
        if one != other or learnt or also:
            break
        shared += 1
    return shared


def _full_columns(kind: rendering_pb2.RenderingKind.ValueType) -> Sequence[str]:
    return PROMPT_COLUMNS if kind == rendering_pb2.RENDERING_KIND_PROMPT else ROW_COLUMNS


class RenderHandler(FamilyTasks[Rendering, RenderingPrivate]):
    """Follows RENDER tasks."""

    result_limits = RESULT_LIMITS

    def __init__(self, renderings: RenderingService) -> None:
        states = TaskStates(
            queued=State.STATE_QUEUED, begun=State.STATE_RENDERING, cancelled=State.STATE_CANCELLED
        )
        super().__init__(renderings.family, states)
        self._renderings = renderings

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to render."""
        rendering, version = await self._renderings.to_render(connection, task.uid)
        message = rendering.message
        spec = task_pb2.RenderSpec(
            shards=version.private.shards,
            dataset_digest=version.message.digest,
            model=task_pb2.ModelReference(name=message.model, digest=rendering.private.model_digest),
            tokenizer_digest=message.tokenizer_digest,
            chat_template=message.chat_template,
            mask_mode=message.mask_mode,
            max_tokens=message.max_tokens,
            length_policy=message.length_policy,
            template_date=message.template_date,
            split_turns=message.split_turns,
            template_error_policy=message.template_error_policy,
            kind=message.kind,
        )
        return task_pb2.Task(render=spec)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The rendering is READY."""
        await self._renderings.rendered(connection, task.uid, result.render)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The rendering is FAILED; the records that could not be rendered are kept."""
        known = result.render if result is not None and result.HasField("render") else None
        await self._renderings.failed(connection, task.uid, failure, known)
