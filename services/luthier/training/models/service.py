"""What can be done with models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import AlreadyExists, Failure, NotFound, OutOfRange
from luthier.errors.status import failure_to_status
from luthier.runtime.names import child_name, new_id
from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models import repository, rules
from luthier.training.models.rules import State
from luthier.training.models.sources import resolve_allowed
from luthier.v1.model_pb2 import Model, Taught
from luthier.v1.model_service_pb2 import RegisterBaseModelRequest
from luthier.work.families import Family, Needs, Tasks, Work, referred, require_state
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, Live
from luthier.work.log import EventLog
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import BlobFile, RegisterModelResult

FILTERS = ("state", "labels", "kind", "base_model", "fine_tuning_job")
StoredModel = Stored[Model, ModelPrivate]


class ModelService:
    """Use cases of models. A parent's project is checked by the caller."""

    def __init__(
        self, database: Database, log: EventLog, tasks: Tasks, blobs: BlobStore, roots: Sequence[Path]
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._roots = tuple(roots)
        lifecycle = Lifecycle(Model.State.DESCRIPTOR, rules.TRANSITIONS)
        self._models = repository.models()
        self.family = Family(self._models, lifecycle, database, log, tasks)

    async def register(self, request: RegisterBaseModelRequest) -> Model:
        """Queue the registration of a base model.

        Raises:
            InvalidArgument: a field is wrong, or the path lies outside the allowed roots (PATH_NOT_ALLOWED).
            AlreadyExists: the id is taken.
            ResourceExhausted: DISK_FULL.
        """
        rules.check_model(request.model)
        model = rules.resolved(request.model)
        model.name = child_name(request.parent, "models", request.model_id, field="model_id", prefix="model")
        if model.HasField("directory"):
            model.directory = await self._resolve(model.directory, "model.directory", folder=True)
        if model.HasField("gguf_path"):
            model.gguf_path = await self._resolve(model.gguf_path, "model.gguf_path", folder=False)
        self._database.disk.require_room()
        work = Work(kind=TaskKind.REGISTER_MODEL)
        async with self._database.transaction() as connection:
            return (await self.family.add(connection, model, ModelPrivate(), work)).message

    async def _resolve(self, path: str, field: str, *, folder: bool) -> str:
        return str(await asyncio.to_thread(resolve_allowed, path, self._roots, field=field, folder=folder))

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[Model, ...], str]:
        """Return a page of a project's models and the next page's token. Raises InvalidArgument."""
        live: Mapping[str, Live] = {
            "base_model": self.family.live,
            "fine_tuning_job": partial(repository.live_job, self._database),
        }
        return await self.family.page(request, tokens, filters=FILTERS, live=live)

    async def live(self, name: str) -> Sequence[str]:
        """Return the uid of the model that has a name now, as filters take it; empty when none has."""
        return await self.family.live(name)

    async def ready(self, name: str, uid: str = "") -> StoredModel:
        """Return a READY model, the one of a uid if that is given; its files are in the order of their paths.

        Raises NotFound, FailedPrecondition WRONG_STATE.
        """
        return self._ready(await self.family.read(name, uid))

    async def read_file(self, name: str, path: str, offset: int, uid: str = "") -> AsyncIterator[bytes]:
        """Return the bytes of one file from an offset on, in pieces of at most 1 MiB.

        Raises:
            NotFound: no such model, it has no such file, or another uid than the one that is given.
            FailedPrecondition: it is not READY.
            OutOfRange: the offset is beyond the end.
        """
        files = (await self.ready(name, uid)).private.files
        found = next((file for file in files if file.path == path), None)
        if found is None:
            known = ", ".join(file.path for file in files)
            raise NotFound(f"{name} has no file {path!r}; it has {known}", metadata={"path": path})
        if not 0 <= offset <= found.size_bytes:
            raise OutOfRange(
                f"start_offset must be in 0..{found.size_bytes}, got {offset}",
                metadata={"size_bytes": str(found.size_bytes)},
            )
        return self._blobs.read(found.sha256, offset=offset)

    async def find_base(self, connection: AsyncConnection, name: str) -> StoredModel:
        """Return a READY base model. Raises NotFound, InvalidArgument, FailedPrecondition WRONG_STATE."""
        model = await self.family.get(connection, name)
        rules.require_base(model.message, "fine_tuning_job.base_model")
        return self._ready(model)

    async def base(self, connection: AsyncConnection, uid: str) -> StoredModel:
        """Return the model of a uid. Raises NotFound."""
        return await self.family.of_uid(connection, uid)

    async def exists(self, connection: AsyncConnection, name: str) -> bool:
        """Tell whether a name is taken."""
        return await self._models.find(connection, name) is not None

    async def keep_template(self, taught: Taught) -> None:
        """Store the template file of a model that will be taught so."""
        if taught.chat_template:
            await self._blobs.put_bytes(taught.chat_template.encode())

    async def add_adapter(
        self, connection: AsyncConnection, wanted: Model, tuned: Sequence[BlobFile]
    ) -> StoredModel:
        """Store a tuned adapter as READY, and return it.

        `wanted` says its name, base model, job, step, how it was taught and what it was made from. Its name is
        another one when the wanted one was taken after the job began; no work is lost.
        """
        base = await self.base(connection, referred(wanted, wanted.base_model).uid)
        bundle = rules.taught_bundle(wanted, base.message, base.private.files)
        files = rules.adapter_files(bundle, tuned)
        adapter = rules.adapter(wanted, files)
        private = ModelPrivate(files=files)
        lasting = [base.uid]
        if not wanted.HasField("taught"):  # only its job still leads to how it is asked
            lasting.append(referred(wanted, wanted.fine_tuning_job).uid)
        needs = Needs(lasting=lasting)
        try:
            return await self.family.add(connection, adapter, private, needs=needs)
        except AlreadyExists:
            place, _, taken = wanted.name.rpartition("/")
            adapter.name = f"{place}/{new_id(taken[:50].rstrip('-'))}"
            return await self.family.add(connection, adapter, private, needs=needs)

    async def registered(self, connection: AsyncConnection, uid: str, result: RegisterModelResult) -> None:
        """The model is READY. Raises InvalidArgument MODEL_INVALID for a result that contradicts itself."""
        model = await self.family.of_uid(connection, uid)
        private = model.copy_private()
        private.files.extend(rules.registered_files(result))
        changed = rules.registered(model.message, result)
        await self.family.move(connection, model, State.STATE_READY, changed=changed, private=private)

    async def failed(self, connection: AsyncConnection, uid: str, failure: Failure) -> None:
        """The model is FAILED."""
        model = await self.family.of_uid(connection, uid)
        changed = model.copy()
        changed.error.CopyFrom(failure_to_status(failure))
        await self.family.move(connection, model, State.STATE_FAILED, changed=changed)

    def _ready(self, model: StoredModel) -> StoredModel:
        return require_state(model, State.STATE_READY, self.family.lifecycle)
