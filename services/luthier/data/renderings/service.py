"""What can be done with renderings."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.names import MODEL, VERSION
from luthier.data.renderings import repository
from luthier.data.renderings.domain import (
    ModelView,
    NewRendering,
    ReadyVersion,
    RefusedRecord,
    Rendering,
    RenderingOutcome,
    RenderingState,
    rendering_violations,
    require_renderable,
    resolve_max_tokens,
)
from luthier.errors import Failure, InvalidArgument
from luthier.runtime.labels import label_violations
from luthier.runtime.names import check_id, new_id, project_of, same_project
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.resources import require_etag
from luthier.work.events import Entry, StateChanged
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import NewTask, Task, TaskKind


class Versions(Protocol):
    """Where renderings find their records."""

    async def ready_version(self, name: str) -> ReadyVersion:
        """Return a READY version. Raises NotFound, FailedPrecondition WRONG_STATE."""
        ...


class Models(Protocol):
    """Where renderings find their tokenizers."""

    async def get(self, name: str) -> ModelView:
        """Return a model. Raises NotFound, and Unavailable when its service is away."""
        ...


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...

    async def request_cancel(self, connection: AsyncConnection, subject: str) -> None:
        """Stop the task of a resource in the caller's transaction."""
        ...


def _now() -> datetime:
    return datetime.now(UTC)


class RenderingService:
    """Use cases of renderings. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        versions: Versions,
        models: Models,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._database = database
        self._log = log
        self._tasks = tasks
        self._versions = versions
        self._models = models
        self._clock = clock
        self._renderings = repository.renderings()
        self._errors = repository.RenderingErrors()

    async def create(self, parent: str, rendering_id: str, wanted: NewRendering) -> Rendering:
        """Queue a rendering in the project `parent`; it freezes what the model says now, and today's date.

        Raises InvalidArgument (also CROSS_PROJECT_REFERENCE), NotFound, AlreadyExists, FailedPrecondition
        WRONG_STATE, ResourceExhausted DISK_FULL, and Unavailable when the service of the model is away.
        """
        violations = [
            *rendering_violations(wanted),
            *label_violations(wanted.labels, "rendering.labels"),
        ]
        if violations:
            raise InvalidArgument.of_fields(*violations)
        VERSION.parse(wanted.dataset_version, field="rendering.dataset_version")
        MODEL.parse(wanted.model, field="rendering.model")
        same_project(parent, wanted.dataset_version, "rendering.dataset_version")
        same_project(parent, wanted.model, "rendering.model")
        chosen = check_id(rendering_id, field="rendering_id") if rendering_id else new_id("rendering")
        self._database.disk.require_room()
        await self._versions.ready_version(wanted.dataset_version)
        # Before the transaction: nobody else could write while another service makes up its mind.
        model = await self._models.get(wanted.model)
        require_renderable(model)
        rendering = self._new(f"{parent}/renderings/{chosen}", wanted, model)
        new = NewTask(
            kind=TaskKind.RENDER,
            subject=rendering.name,
            project=project_of(rendering.name),
            resources=(wanted.model,),
        )
        async with self._database.transaction() as connection:
            await self._renderings.insert(connection, rendering)
            await self._announce(connection, rendering)
            await self._tasks.enqueue(connection, new)
        return rendering

    async def get(self, name: str) -> Rendering:
        """Return a rendering. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._renderings.get(connection, name)

    async def ready(self, name: str) -> Rendering:
        """Return a READY rendering. Raises NotFound, FailedPrecondition WRONG_STATE."""
        return (await self.get(name)).require_ready()

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[Rendering, ...], str]:
        """Return a page of a project's renderings and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._renderings, tokens, request)

    async def cancel(self, name: str, etag: str) -> Rendering:
        """Ask a rendering to stop; one that has ended or is stopping stays as it is.

        Raises NotFound, Aborted ETAG_MISMATCH.
        """
        async with self._database.transaction(makes_room=True) as connection:
            rendering = await self._renderings.get(connection, name)
            require_etag(rendering, etag)
            if rendering.final or rendering.state is RenderingState.CANCELLING:
                return rendering
            await self._save(connection, rendering.cancelling())
            await self._tasks.request_cancel(connection, name)
            return await self._renderings.get(connection, name)

    async def list_errors(self, name: str, start: int, limit: int) -> Sequence[RefusedRecord]:
        """Return at most `limit` records that could not be rendered from position `start` on. Raises NotFound."""
        async with self._database.reading() as connection:
            await self._renderings.get(connection, name)
            return await self._errors.page(connection, name, start, limit)

    async def to_render(self, connection: AsyncConnection, name: str) -> tuple[Rendering, ReadyVersion]:
        """Return what a worker needs: the rendering as the transaction sees it, and its version."""
        rendering = await self._renderings.get(connection, name)
        return rendering, await self._versions.ready_version(rendering.dataset_version)

    async def started(self, connection: AsyncConnection, name: str) -> None:
        """A worker began to render."""
        rendering = await self._renderings.get(connection, name)
        await self._save(connection, rendering.begun())

    async def lost(self, connection: AsyncConnection, name: str) -> None:
        """The worker was lost; another will begin anew."""
        rendering = await self._renderings.get(connection, name)
        await self._save(connection, rendering.queued_again())

    async def rendered(self, connection: AsyncConnection, name: str, outcome: RenderingOutcome) -> None:
        """The rendering is READY. Raises InvalidArgument for an outcome that contradicts itself."""
        rendering = await self._renderings.get(connection, name)
        await self._errors.add(connection, name, outcome.errors)
        await self._save(connection, rendering.rendered(outcome))

    async def failed(
        self,
        connection: AsyncConnection,
        name: str,
        failure: Failure,
        outcome: RenderingOutcome | None = None,
    ) -> None:
        """The rendering is FAILED; `outcome` is what is known all the same."""
        rendering = await self._renderings.get(connection, name)
        await self._errors.add(connection, name, outcome.errors if outcome is not None else ())
        await self._save(connection, rendering.failed(failure, outcome))

    async def cancelled(self, connection: AsyncConnection, name: str) -> None:
        """The rendering stopped on request."""
        rendering = await self._renderings.get(connection, name)
        await self._save(connection, rendering.cancelled())

    def _new(self, name: str, wanted: NewRendering, model: ModelView) -> Rendering:
        now = self._clock()
        return Rendering(
            name=name,
            uid=str(uuid.uuid4()),
            state=RenderingState.QUEUED,
            labels=wanted.labels,
            create_time=now,
            update_time=now,
            revision=1,
            dataset_version=wanted.dataset_version,
            model=wanted.model,
            chat_template=wanted.chat_template,
            mask_mode=wanted.mask_mode,
            max_tokens=resolve_max_tokens(wanted.max_tokens, model),
            length_policy=wanted.length_policy,
            split_turns=wanted.split_turns,
            template_error_policy=wanted.template_error_policy,
            model_digest=model.digest,
            tokenizer_digest=model.tokenizer_digest,
            template_date=now.date().isoformat(),
        )

    async def _save(self, connection: AsyncConnection, rendering: Rendering) -> None:
        await self._announce(connection, await self._renderings.update(connection, rendering))

    async def _announce(self, connection: AsyncConnection, rendering: Rendering) -> None:
        change = StateChanged(state=rendering.state, failure=rendering.failure, final=rendering.final)
        await self._log.append(connection, rendering.name, [Entry(payload=change)])
