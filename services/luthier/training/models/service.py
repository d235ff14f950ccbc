"""What can be done with models."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import (
    AlreadyExists,
    Failure,
    FieldViolation,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reason,
)
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.runtime.names import check_id, new_id, project_of
from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.training.files import files_digest
from luthier.training.models import repository
from luthier.training.models.domain import (
    DirectorySource,
    GgufSource,
    HubSource,
    Model,
    ModelFile,
    ModelKind,
    ModelOutcome,
    ModelState,
    Source,
)
from luthier.training.models.sources import resolve_allowed
from luthier.training.teaching import TEMPLATE_PATH, Taught
from luthier.work.events import Entry, StateChanged
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import NewTask, Task, TaskKind

FILTERS = ("state", "labels", "kind", "base_model", "fine_tuning_job")
_REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_REVISION = re.compile(r"[\w./-]{0,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBaseModel:
    """A base model as asked for."""

    source: Source | None
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...


def _now() -> datetime:
    return datetime.now(UTC)


class ModelService:
    """Use cases of models. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        blobs: BlobStore,
        roots: Sequence[Path],
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._database = database
        self._log = log
        self._tasks = tasks
        self._blobs = blobs
        self._roots = tuple(roots)
        self._clock = clock
        self._models = repository.models()

    async def register(self, parent: str, model_id: str, new: NewBaseModel) -> Model:
        """Queue the registration of a base model.

        Raises:
            InvalidArgument: a field is wrong, or the path lies outside the allowed roots (PATH_NOT_ALLOWED).
            AlreadyExists: the id is taken.
            ResourceExhausted: DISK_FULL.
        """
        violations = [
            *display_name_violations(new.display_name, "model.display_name"),
            *label_violations(new.labels, "model.labels"),
        ]
        if violations:
            raise InvalidArgument.of_fields(*violations)
        chosen = check_id(model_id, field="model_id") if model_id else new_id("model")
        source = await self._checked(new.source)
        self._database.disk.require_room()
        now = self._clock()
        model = Model(
            name=f"{parent}/models/{chosen}",
            uid=str(uuid.uuid4()),
            state=ModelState.QUEUED,
            labels=dict(new.labels),
            create_time=now,
            update_time=now,
            revision=1,
            kind=ModelKind.BASE,
            display_name=new.display_name,
            source=source,
        )
        task = NewTask(kind=TaskKind.REGISTER_MODEL, subject=model.name, project=project_of(parent))
        async with self._database.transaction() as connection:
            await self._models.insert(connection, model)
            await self._announce(connection, model)
            await self._tasks.enqueue(connection, task)
        return model

    async def _checked(self, source: Source | None) -> Source:
        match source:
            case HubSource():
                _check_hub(source)
                return replace(source, revision=source.revision or "main")
            case DirectorySource(directory=path):
                real = await self._resolve(path, "model.directory", folder=True)
                return DirectorySource(directory=str(real))
            case GgufSource(gguf_path=path):
                real = await self._resolve(path, "model.gguf_path", folder=False)
                return GgufSource(gguf_path=str(real))
            case None:
                description = "must be one of hub, directory and gguf_path, got none"
                raise InvalidArgument.of_fields(
                    FieldViolation(
                        field="model.source", description=description, reason=Reason.FIELD_REQUIRED
                    )
                )

    async def _resolve(self, path: str, field_name: str, *, folder: bool) -> Path:
        return await asyncio.to_thread(resolve_allowed, path, self._roots, field=field_name, folder=folder)

    async def get(self, name: str) -> Model:
        """Return a model. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._models.get(connection, name)

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[Model, ...], str]:
        """Return a page of a project's models and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._models, tokens, request, filters=FILTERS)

    async def files(self, name: str, after_path: str, limit: int) -> Sequence[ModelFile]:
        """Return at most `limit` files after a path, in order. Raises NotFound, FailedPrecondition."""
        model = (await self.get(name)).require_ready()
        return [file for file in model.files if file.path > after_path][:limit]

    async def read_file(self, name: str, path: str, offset: int) -> AsyncIterator[bytes]:
        """Return the bytes of one file from an offset on, in pieces of at most 1 MiB.

        Raises:
            NotFound: no such model, or it has no such file.
            FailedPrecondition: it is not READY.
            OutOfRange: the offset is beyond the end.
        """
        model = (await self.get(name)).require_ready()
        found = next((file for file in model.files if file.path == path), None)
        if found is None:
            known = ", ".join(file.path for file in model.files)
            raise NotFound(f"{name} has no file {path!r}; it has {known}", metadata={"path": path})
        if not 0 <= offset <= found.size_bytes:
            raise OutOfRange(
                f"start_offset must be in 0..{found.size_bytes}, got {offset}",
                metadata={"size_bytes": str(found.size_bytes)},
            )
        return self._blobs.read(found.sha256, offset=offset)

    async def find_base(self, connection: AsyncConnection, name: str) -> Model:
        """Return a READY base model. Raises NotFound, InvalidArgument, FailedPrecondition WRONG_STATE."""
        return (await self._models.get(connection, name)).require_base("fine_tuning_job.base_model")

    async def exists(self, connection: AsyncConnection, name: str) -> bool:
        """Tell whether a name is taken."""
        return await self._models.find(connection, name) is not None

    async def keep_template(self, taught: Taught) -> None:
        """Store the template file of a model that will be taught so."""
        if taught.chat_template:
            await self._blobs.put_bytes(taught.chat_template.encode())

    async def add_adapter(
        self,
        connection: AsyncConnection,
        name: str,
        base_model: str,
        fine_tuning_job: str,
        step: int,
        files: Mapping[str, tuple[str, int]],
        taught: Taught | None,
    ) -> str:
        """Store a tuned adapter as READY; `files` maps a path to its digest and size.

        With what it was taught come the tokenizer's files, so that whoever downloads it asks it the same way.
        Returns its name: another one when the wanted one was taken after the job began; no work is lost.
        """
        now = self._clock()
        base = await self._models.find(connection, base_model)
        bundle = _taught_bundle(base, taught) if base is not None and taught is not None else ()
        bundle = tuple(file for file in bundle if file.path not in files)
        stored = sorted(
            (
                *bundle,
                *(
                    ModelFile(path=path, sha256=sha256, size_bytes=size, tokenizer=False)
                    for path, (sha256, size) in files.items()
                ),
            ),
            key=lambda file: file.path,
        )
        adapter = Model(
            name=name,
            uid=str(uuid.uuid4()),
            state=ModelState.READY,
            labels={},
            create_time=now,
            update_time=now,
            revision=1,
            kind=ModelKind.ADAPTER,
            base_model=base_model,
            fine_tuning_job=fine_tuning_job,
            step=step,
            digest=files_digest({file.path: file.sha256 for file in stored}),
            has_chat_template=any(file.path == TEMPLATE_PATH for file in bundle),
            files=tuple(stored),
            taught=taught,
        )
        try:
            await self._models.insert(connection, adapter)
        except AlreadyExists:
            place, _, taken = name.rpartition("/")
            adapter = replace(adapter, name=f"{place}/{taken[:54].rstrip('-')}-{adapter.uid[:8]}")
            await self._models.insert(connection, adapter)
        await self._announce(connection, adapter)
        return adapter.name

    async def to_register(self, connection: AsyncConnection, name: str) -> Model:
        """Return the model as the transaction sees it."""
        return await self._models.get(connection, name)

    async def started(self, connection: AsyncConnection, name: str) -> None:
        """A worker began to read the source."""
        model = await self._models.get(connection, name)
        await self._save(connection, model.moved(ModelState.REGISTERING))

    async def lost(self, connection: AsyncConnection, name: str) -> None:
        """The worker was lost; another will begin anew."""
        model = await self._models.get(connection, name)
        await self._save(connection, model.moved(ModelState.QUEUED))

    async def registered(self, connection: AsyncConnection, name: str, outcome: ModelOutcome) -> None:
        """The model is READY."""
        model = await self._models.get(connection, name)
        source = model.source
        if isinstance(source, HubSource) and outcome.hub_commit:
            source = replace(source, revision=outcome.hub_commit)
        ready = replace(
            model.moved(ModelState.READY),
            source=source,
            files=outcome.files,
            digest=outcome.digest,
            tokenizer_digest=outcome.tokenizer_digest,
            architecture=outcome.architecture,
            num_parameters=outcome.num_parameters,
            context_length=outcome.context_length,
            has_chat_template=outcome.has_chat_template,
            eos_token_ids=outcome.eos_token_ids,
            warnings=outcome.warnings,
        )
        await self._save(connection, ready)

    async def failed(self, connection: AsyncConnection, name: str, failure: Failure) -> None:
        """The model is FAILED."""
        model = await self._models.get(connection, name)
        await self._save(connection, replace(model.moved(ModelState.FAILED), failure=failure))

    async def _save(self, connection: AsyncConnection, model: Model) -> None:
        await self._announce(connection, await self._models.update(connection, model))

    async def _announce(self, connection: AsyncConnection, model: Model) -> None:
        change = StateChanged(state=model.state, failure=model.failure, final=model.final)
        await self._log.append(connection, model.name, [Entry(payload=change)])


def _taught_bundle(base: Model, taught: Taught) -> tuple[ModelFile, ...]:
    """Return the files of the base model's tokenizer with the template that was taught in place of its own."""
    if base.tokenizer_digest != taught.tokenizer_digest:
        return ()
    files = {file.path: file for file in base.files if file.tokenizer}
    if taught.chat_template:
        sha256, size_bytes = taught.template_file
        files[TEMPLATE_PATH] = ModelFile(
            path=TEMPLATE_PATH, sha256=sha256, size_bytes=size_bytes, tokenizer=True
        )
    return tuple(files.values())


def _check_hub(source: HubSource) -> None:
    if not _REPO_ID.fullmatch(source.repo_id):
        description = f"must be like HuggingFaceTB/SmolLM2-135M-Instruct, got {source.repo_id!r}"
        raise InvalidArgument.of_fields(FieldViolation(field="model.hub.repo_id", description=description))
    if not _REVISION.fullmatch(source.revision):
        description = f"must be a commit, tag or branch, got {source.revision!r}"
        raise InvalidArgument.of_fields(FieldViolation(field="model.hub.revision", description=description))
