"""What can be done with models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import AlreadyExists, Failure, NotFound, OutOfRange
from luthier.errors.status import failure_to_status
from luthier.lm.made import GENERATION_CONFIG
from luthier.runtime.names import child_name, new_id
from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models import repository, rules
from luthier.training.models.ends import CONFIG, generation_config
from luthier.training.models.rules import State
from luthier.training.weights import Origin, SeenModel, StoredModel
from luthier.v1.model_pb2 import Model, ModelFile, Taught
from luthier.v1.model_service_pb2 import RegisterBaseModelRequest
from luthier.work.families import Family, Needs, Tasks, Work, referred, require_state
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, Live
from luthier.work.log import EventLog
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import BlobFile, RegisterModelResult

FILTERS = ("state", "labels", "kind", "base_model", "fine_tuning_job")


class ModelService:
    """Use cases of models. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        blobs: BlobStore,
        keeping: Keeping,
    ) -> None:
        self._database = database
        self._blobs = blobs
        lifecycle = Lifecycle(Model.State.DESCRIPTOR, rules.TRANSITIONS)
        self._models = repository.models()
        self.family = Family(self._models, lifecycle, database, log, tasks, keeping)

    async def register(self, request: RegisterBaseModelRequest) -> Model:
        """Queue the registration of a base model.

        Raises:
            InvalidArgument: a field is wrong, or a path that is none on any machine; whether it is there and allowed,
                the worker finds out that reads it.
            AlreadyExists: the id is taken.
            ResourceExhausted: DISK_FULL.
        """
        rules.check_model(request.model)
        model = rules.resolved(request.model)
        model.name = child_name(request.parent, "models", request.model_id, field="model_id", prefix="model")
        self._database.disk.require_room()
        work = Work(kind=TaskKind.REGISTER_MODEL)
        async with self._database.transaction() as connection:
            return (await self.family.add(connection, model, ModelPrivate(), work)).message

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

    def read_file(self, model: SeenModel | StoredModel, path: str, offset: int) -> AsyncIterator[bytes]:
        """Return the bytes of one file of a model from an offset on, in pieces of at most 1 MiB.

        Raises:
            NotFound: it has no such file.
            OutOfRange: the offset is beyond the end.
        """
        files = model.private.files
        found = next((file for file in files if file.path == path), None)
        if found is None:
            known = ", ".join(file.path for file in files)
            raise NotFound(
                f"{model.message.name} has no file {path!r}; it has {known}", metadata={"path": path}
            )
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

    async def find_ready(self, connection: AsyncConnection, name: str) -> StoredModel:
        """Return a READY model of any kind. Raises NotFound, FailedPrecondition WRONG_STATE."""
        return self._ready(await self.family.get(connection, name))

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

    async def keep_generation_config(self, base: StoredModel, taught: Taught) -> ModelFile | None:
        """Store and return the generation config of a model that will be taught so on a base.

        None: nobody names a token that ends answers. Raises InvalidArgument MODEL_INVALID where the base's own files
        cannot be read.
        """
        settings = await self._content(base, GENERATION_CONFIG)
        # Asked only where the base does not say its ends itself.
        config = b"" if base.message.eos_token_ids else await self._content(base, CONFIG)
        content = generation_config(base.message, taught, settings, config)
        if not content:
            return None
        blob = await self._blobs.put_bytes(content)
        return ModelFile(path=GENERATION_CONFIG, sha256=blob.digest, size_bytes=blob.size_bytes)

    async def _content(self, model: StoredModel, path: str) -> bytes:
        """Return the bytes of a model's file; none where it has no such file."""
        digest = next((file.sha256 for file in model.private.files if file.path == path), None)
        return b"" if digest is None else await self._blobs.read_bytes(digest)

    async def tuned(
        self, connection: AsyncConnection, wanted: Model, origin: Origin, brought: Sequence[BlobFile]
    ) -> SeenModel:
        """Return what a tuned model of these files is, without storing it; files that are no result are left out.

        Raises NotFound when its base model is gone, InvalidArgument MODEL_INVALID for files of another kind.
        """
        base = await self.base(connection, origin.base_uid)
        keeps = origin.has_own_template and not wanted.base_model
        bundle = rules.taught_bundle(wanted, base.message, base.private.files, keeps_template=keeps)
        if origin.generation_config is not None:
            bundle.append(origin.generation_config)
        files = rules.tuned_files(wanted, bundle, base.private.files, brought)
        model = rules.tuned(wanted, base.message, files)
        private = ModelPrivate(files=files, has_own_template=origin.has_own_template)
        return SeenModel(uid=wanted.uid, message=model, private=private)

    async def add_tuned(
        self, connection: AsyncConnection, wanted: Model, origin: Origin, tuned: Sequence[BlobFile]
    ) -> StoredModel:
        """Store a tuned model as READY, and return it.

        `wanted` says its name, kind, job, step, how it was taught and what it was made from; an adapter its base.
        Its name is another one when the wanted one was taken after the job began; no work is lost.

        Raises InvalidArgument MODEL_INVALID for files that are not those of its kind.
        """
        seen = await self.tuned(connection, wanted, origin, tuned)
        model, private = seen.message, seen.private
        lasting = [origin.base_uid] if wanted.base_model else []
        if not wanted.HasField("taught"):  # only its job still leads to how it is asked
            lasting.append(referred(wanted, wanted.fine_tuning_job).uid)
        needs = Needs(lasting=lasting)
        try:
            return await self.family.add(connection, model, private, needs=needs)
        except AlreadyExists:
            place, _, taken = wanted.name.rpartition("/")
            model.name = f"{place}/{new_id(taken[:50].rstrip('-'))}"
            return await self.family.add(connection, model, private, needs=needs)

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
