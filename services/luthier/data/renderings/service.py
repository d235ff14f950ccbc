"""What can be done with renderings."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.names import MODEL, VERSION
from luthier.data.record_errors import add_errors, page_of_errors
from luthier.data.renderings import repository, rules
from luthier.data.renderings.rules import State
from luthier.errors import Failure
from luthier.errors.status import failure_to_status
from luthier.runtime.names import child_name
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate, RenderingPrivate
from luthier.v1.data_service_pb2 import CreateRenderingRequest
from luthier.v1.dataset_pb2 import DatasetVersion, RecordError
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.elsewhere import Elsewhere
from luthier.work.families import Family, Needs, Tasks, Work, referred, require_state
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.log import EventLog
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import RenderResult

StoredRendering = Stored[Rendering, RenderingPrivate]
StoredVersion = Stored[DatasetVersion, DatasetVersionPrivate]


class Versions(Protocol):
    """Where renderings find their records."""

    async def ready_version(self, name: str) -> StoredVersion:
        """Return a READY version. Raises NotFound, FailedPrecondition WRONG_STATE."""
        ...

    async def require(self, connection: AsyncConnection, uid: str) -> StoredVersion:
        """Return a version as the transaction sees it. Raises NotFound."""
        ...


class Models(Protocol):
    """Where renderings find their tokenizers."""

    async def get(self, name: str) -> Model:
        """Return a model. Raises NotFound, and Unavailable when its service is away."""
        ...


class RenderingService:
    """Use cases of renderings. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        versions: Versions,
        models: Models,
        elsewhere: Elsewhere,
        keeping: Keeping,
    ) -> None:
        self._database = database
        self._versions = versions
        self._models = models
        self._elsewhere = elsewhere
        lifecycle = Lifecycle(Rendering.State.DESCRIPTOR, rules.TRANSITIONS)
        self.family = Family(repository.renderings(), lifecycle, database, log, tasks, keeping)

    async def create(self, request: CreateRenderingRequest) -> Rendering:
        """Queue a rendering; it freezes what the model says now, and today's date.

        Raises InvalidArgument, NotFound, AlreadyExists, FailedPrecondition
        WRONG_STATE, ResourceExhausted DISK_FULL, and Unavailable when the service of the model is away.
        """
        wanted = request.rendering
        rules.check_rendering(wanted)
        VERSION.parse(wanted.dataset_version, field="rendering.dataset_version")
        MODEL.parse(wanted.model, field="rendering.model")
        name = child_name(
            request.parent, "renderings", request.rendering_id, field="rendering_id", prefix="rendering"
        )
        self._database.disk.require_room()
        version = await self._versions.ready_version(wanted.dataset_version)
        # Before the transaction: nobody else could write while another service makes up its mind.
        model = await self._models.get(wanted.model)
        rendering = rules.resolved(wanted, model, datetime.now(UTC).date())
        rendering.name = name
        rendering.references.add(name=wanted.dataset_version, uid=version.uid, digest=version.message.digest)
        of_model = rendering.references.add(name=wanted.model, uid=model.uid, digest=model.digest)
        private = RenderingPrivate(model_digest=model.digest)
        work = Work(kind=TaskKind.RENDER, resources=(wanted.model,))
        async with (
            self._elsewhere.holding(name, [of_model]) as holds,
            self._database.transaction() as connection,
        ):
            # As the transaction sees it: it may have been deleted meanwhile.
            await self._versions.require(connection, version.uid)
            needs = Needs(until_end=(version.uid,), elsewhere=holds)
            return (await self.family.add(connection, rendering, private, work, needs)).message

    async def ready(self, name: str, uid: str = "") -> StoredRendering:
        """Return a READY rendering, that of a uid if one is given. Raises NotFound, FailedPrecondition WRONG_STATE."""
        return require_state(await self.family.read(name, uid), State.STATE_READY, self.family.lifecycle)

    async def list_errors(self, uid: str, start: int, limit: int) -> Sequence[RecordError]:
        """Return at most `limit` records that could not be rendered, of a rendering's uid, from `start` on."""
        async with self._database.reading() as connection:
            return await page_of_errors(connection, uid, start, limit)

    async def to_render(self, connection: AsyncConnection, uid: str) -> tuple[StoredRendering, StoredVersion]:
        """Return what a worker needs: the rendering as the transaction sees it, and its version."""
        rendering = await self.family.of_uid(connection, uid)
        version = referred(rendering.message, rendering.message.dataset_version)
        return rendering, await self._versions.require(connection, version.uid)

    async def rendered(self, connection: AsyncConnection, uid: str, result: RenderResult) -> None:
        """The rendering is READY. Raises InvalidArgument for a result that contradicts itself."""
        rendering = await self.family.of_uid(connection, uid)
        await add_errors(connection, rendering.uid, result.errors)
        private = rendering.copy_private()
        private.shards.extend(result.shards)
        private.tokenizer_sha256 = result.tokenizer.sha256
        changed = rules.rendered(rendering.message, result)
        await self.family.move(connection, rendering, State.STATE_READY, changed=changed, private=private)

    async def failed(
        self, connection: AsyncConnection, uid: str, failure: Failure, result: RenderResult | None = None
    ) -> None:
        """The rendering is FAILED; `result` is what is known all the same."""
        rendering = await self.family.of_uid(connection, uid)
        changed = rendering.copy()
        if result is not None:
            await add_errors(connection, rendering.uid, result.errors)
            changed.num_errors = result.num_errors
        changed.error.CopyFrom(failure_to_status(failure))
        await self.family.move(connection, rendering, State.STATE_FAILED, changed=changed)
