"""What can be done to have models made from others: adapters merged, models exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, NotFound
from luthier.runtime.names import child_name
from luthier.storage.database import Database
from luthier.storage.stored import require_uid
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models import rules
from luthier.training.models.rules import State
from luthier.training.models.service import ModelService
from luthier.training.names import is_checkpoint
from luthier.training.weights import Origin, SeenModel, StoredModel, weight_files
from luthier.v1.fine_tuning_job_pb2 import HeldOutScores
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.v1.model_service_pb2 import ExportModelRequest, MergeModelRequest
from luthier.work.families import Needs, Work, referred
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import ExportResult, MergeResult


class Jobs(Protocol):
    """What this family needs of jobs: the two meet where the service is put together."""

    async def find(self, connection: AsyncConnection, name: str) -> SeenModel | None:
        """Return a checkpoint as the model that it would be; None when there is none of this name."""
        ...

    async def trains(self, connection: AsyncConnection, name: str) -> str:
        """Return the job that will make a model of this name; empty: none that has not ended."""
        ...

    async def held_out(self, connection: AsyncConnection, model: Model) -> HeldOutScores | None:
        """Return what was found of held-out tokens at a model's step; None where it is not known."""
        ...


class ModelMaking:
    """Use cases of models that are made from others. A source's project is checked by the caller."""

    def __init__(self, database: Database, models: ModelService, jobs: Jobs) -> None:
        self._database = database
        self._models = models
        self._jobs = jobs

    async def merge(self, request: MergeModelRequest) -> Model:
        """Queue the merge of an adapter into its base.

        Raises:
            NotFound: there is no such model or checkpoint.
            InvalidArgument: a field is wrong, or it is no adapter of a model of words.
            FailedPrecondition: WRONG_STATE; it is not READY, or a job still trains it.
            AlreadyExists: the id is taken.
            ResourceExhausted: DISK_FULL.
        """
        self._database.disk.require_room()
        seen, ends = await self._ends(request)
        async with self._database.transaction() as connection:
            source = await self._source(connection, request.name)
            require_uid(source, seen)
            made = rules.merged_from(source.message, request)
            made.name = _name_of(request)
            base = await self._base(connection, source)
            private = ModelPrivate(
                source_files=base.private.files,
                adapter_files=weight_files(source),
                has_own_template=source.private.has_own_template,
                source_uid=base.uid,
                base_precision=source.message.base_precision,
                generation_config=ends,
            )
            work = Work(kind=TaskKind.MERGE)
            return await self._add(connection, made, private, work, (source.uid, base.uid))

    async def export(self, request: ExportModelRequest) -> Model:
        """Queue the writing of a model as a file for other programs.

        Raises as `merge`, InvalidArgument also for a model that has no such form (EXPORT_NOT_POSSIBLE).
        """
        self._database.disk.require_room()
        async with self._database.transaction() as connection:
            source = await self._source(connection, request.name)
            base = await self._base(connection, source) if source.message.base_model else source
            made = rules.exported_from(source.message, base.message, request)
            made.name = _name_of(request)
            added = rules.adapter_files(source.private.files) if source.message.base_model else []
            private = ModelPrivate(
                source_files=base.private.files,
                adapter_files=added,
                source_uid=base.uid,
                base_precision=source.message.base_precision,
            )
            work = Work(kind=TaskKind.EXPORT)
            return await self._add(connection, made, private, work, (source.uid, base.uid))

    async def held_out(self, connection: AsyncConnection, model: Model) -> HeldOutScores | None:
        """Return what its job found of held-out tokens with the weights that a model was made from, if anything."""
        return await self._jobs.held_out(connection, model) if model.fine_tuning_job else None

    async def merged(self, connection: AsyncConnection, uid: str, result: MergeResult) -> None:
        """The model is READY, with all its weights. Raises InvalidArgument MODEL_INVALID for other files."""
        stored = await self._models.family.of_uid(connection, uid)
        private = stored.private
        origin = Origin(
            base_uid=private.source_uid,
            has_own_template=private.has_own_template,
            generation_config=private.generation_config if private.HasField("generation_config") else None,
        )
        seen = await self._models.tuned(connection, stored.message, origin, result.files)
        changed = seen.message
        changed.state = stored.message.state
        changed.check.CopyFrom(result.check)
        changed.warnings.extend(result.warnings)
        await self._ready(connection, stored, changed, seen.private)

    async def exported(self, connection: AsyncConnection, uid: str, result: ExportResult) -> None:
        """The model is READY to be downloaded."""
        stored = await self._models.family.of_uid(connection, uid)
        sources = {file.path for file in stored.private.source_files}
        sources |= {file.path for file in stored.private.adapter_files}
        changed, files = rules.exported(stored.message, rules.TEMPLATE_PATH in sources, result.files)
        changed.check.CopyFrom(result.check)
        changed.warnings.extend(result.warnings)
        await self._ready(connection, stored, changed, ModelPrivate(files=files))

    async def _ready(
        self, connection: AsyncConnection, stored: StoredModel, changed: Model, private: ModelPrivate
    ) -> None:
        await self._models.family.move(
            connection, stored, State.STATE_READY, changed=changed, private=private
        )

    async def _ends(self, request: MergeModelRequest) -> tuple[str, ModelFile | None]:
        """Store what says where answers of a merge end; returns the uid of what is merged too. Raises as `merge`."""
        async with self._database.reading() as connection:
            source = await self._source(connection, request.name)
            rules.merged_from(source.message, request)
            base = await self._base(connection, source)
        if not source.message.HasField("taught"):
            return source.uid, None
        return source.uid, await self._models.keep_generation_config(base, source.message.taught)

    async def _source(self, connection: AsyncConnection, name: str) -> SeenModel | StoredModel:
        if is_checkpoint(name):
            found = await self._jobs.find(connection, name)
            if found is None:
                raise NotFound(f"{name} does not exist", metadata={"name": name})
            return found
        try:
            return await self._models.find_ready(connection, name)
        except NotFound:
            job = await self._jobs.trains(connection, name)
            if not job:
                raise
            raise FailedPrecondition(
                f"{name} must be READY, {job} still trains it; wait for the job, or name one of its checkpoints: "
                f"{job}/checkpoints/...",
                metadata={"name": name, "job": job},
            ) from None

    async def _base(self, connection: AsyncConnection, source: SeenModel | StoredModel) -> StoredModel:
        reference = referred(source.message, source.message.base_model)
        return await self._models.base(connection, reference.uid)

    async def _add(
        self,
        connection: AsyncConnection,
        made: Model,
        private: ModelPrivate,
        work: Work,
        sources: Sequence[str],
    ) -> Model:
        # Without `taught` only its job still leads to how it is asked.
        untaught = bool(made.fine_tuning_job) and not made.HasField("taught")
        lasting = [referred(made, made.fine_tuning_job).uid] if untaught else []
        needs = Needs(until_end=sources, lasting=lasting)
        return (await self._models.family.add(connection, made, private, work, needs)).message


def _name_of(request: MergeModelRequest | ExportModelRequest) -> str:
    parent = "/".join(request.name.split("/")[:2])
    return child_name(parent, "models", request.model_id, field="model_id", prefix="model")
