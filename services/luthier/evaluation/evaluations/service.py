"""What can be done with evaluations; plain values in and out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, FailedPrecondition, Failure, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.evaluations.domain import (
    FINAL_STATES,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationState,
    Progress,
    check_evaluation,
    moved,
)
from luthier.evaluation.evaluations.repository import Predictions
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.runtime.names import Pattern, check_id, new_id, require_project, same_project
from luthier.storage.database import Database
from luthier.storage.resources import Resources
from luthier.work.events import Entry, StateChanged
from luthier.work.log import EventLog
from luthier.work.queue import Queue
from luthier.work.tasks import NewTask, TaskKind

EVALUATION = Pattern("projects/{project}/evaluations/{evaluation}")
VERSION = Pattern("projects/{project}/datasets/{dataset}/versions/{version}")
MODEL = Pattern("projects/{project}/models/{model}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What an evaluation needs to know of a model; `base_model` is empty for base models."""

    name: str
    ready: bool
    state: str
    digest: str
    base_model: str
    has_chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFacts:
    """What an evaluation needs to know of a dataset version; records by split name."""

    name: str
    ready: bool
    state: str
    digest: str
    num_records: dict[str, int]


class Peers(Protocol):
    """The other services, as far as evaluations need them."""

    async def version(self, name: str) -> VersionFacts:
        """Return a dataset version. Raises NotFound."""
        ...

    async def model(self, name: str) -> ModelFacts:
        """Return a model. Raises NotFound."""
        ...


class EvaluationService:
    """Creates, cancels and follows evaluations."""

    def __init__(
        self,
        database: Database,
        resources: Resources[Evaluation],
        log: EventLog,
        queue: Queue,
        peers: Peers,
        projects: Sequence[str],
    ) -> None:
        self._database = database
        self._resources = resources
        self._predictions = Predictions()
        self._log = log
        self._queue = queue
        self._peers = peers
        self._projects = projects

    async def create(self, parent: str, draft: Evaluation, evaluation_id: str) -> Evaluation:
        """Queue an evaluation described by a draft, whose name and outcome do not count.

        Raises:
            InvalidArgument: a field is not valid or refers to another project.
            NotFound: version or model does not exist.
            FailedPrecondition: version or model is not READY, or there is nothing to ask.
            AlreadyExists: the id is taken.
            ResourceExhausted: DISK_FULL.
        """
        project = require_project(parent, self._projects)
        name = EVALUATION.format(project=project, evaluation=evaluation_id or new_id("evaluation"))
        self._check(parent, draft)
        self._database.disk.require_room()
        resolved = await self._resolve(draft)
        now = datetime.now(UTC)
        evaluation = replace(
            resolved,
            name=name,
            uid=uuid.uuid4().hex,
            state=EvaluationState.QUEUED,
            create_time=now,
            update_time=now,
            revision=1,
        )
        async with self._database.transaction() as connection:
            await self._resources.insert(connection, evaluation)
            await self._log_state(connection, evaluation)
            resources = (evaluation.dataset_version, *sorted(evaluation.model_digests))
            task = NewTask(kind=TaskKind.EVALUATE, subject=name, project=project, resources=resources)
            await self._queue.enqueue(connection, task)
        return evaluation

    def _check(self, parent: str, draft: Evaluation) -> None:
        check_evaluation(draft)
        violations = (
            *label_violations(draft.labels, "evaluation.labels"),
            *display_name_violations(draft.display_name, "evaluation.display_name"),
        )
        if violations:
            raise InvalidArgument.of_fields(*violations)
        VERSION.parse(draft.dataset_version, field="evaluation.dataset_version")
        same_project(parent, draft.dataset_version, "evaluation.dataset_version")
        for index, arm in enumerate(draft.arms):
            MODEL.parse(arm.model, field=f"evaluation.arms[{index}].model")
            same_project(parent, arm.model, f"evaluation.arms[{index}].model")
            check_id(arm.arm_id, field=f"evaluation.arms[{index}].arm_id")

    async def _resolve(self, draft: Evaluation) -> Evaluation:
        version = await self._peers.version(draft.dataset_version)
        _require_ready(version)
        if not version.num_records.get(draft.split):
            raise FailedPrecondition(
                f"{version.name} has no record in the {draft.split} split; it has {version.num_records}",
                reason=Reason.WRONG_STATE,
                metadata={"dataset_version": version.name, "split": draft.split},
            )
        digests: dict[str, str] = {}
        bases: dict[str, str] = {}
        for arm in draft.arms:
            model = await self._peers.model(arm.model)
            _require_ready(model)
            digests[model.name] = model.digest
            bases[model.base_model or model.name] = arm.arm_id
        if len(bases) > 1:
            shown = ", ".join(f"{arm_id}: {base}" for base, arm_id in bases.items())
            raise InvalidArgument.of_fields(
                FieldViolation(
                    field="evaluation.arms", description=f"all arms must share one base model, got {shown}"
                )
            )
        base_model = next(iter(bases))
        if base_model not in digests:
            base = await self._peers.model(base_model)
            _require_ready(base)
            digests[base.name] = base.digest
        return replace(draft, base_model=base_model, dataset_digest=version.digest, model_digests=digests)

    async def get(self, name: str) -> Evaluation:
        """Return an evaluation. Raises NotFound."""
        EVALUATION.parse(name)
        async with self._database.reading() as connection:
            return await self._resources.get(connection, name)

    async def cancel(self, name: str, etag: str) -> Evaluation:
        """Ask an evaluation to stop; one that has ended or is stopping is returned unchanged.

        Raises:
            NotFound: no evaluation has this name.
            Aborted: it changed since `etag` was read.
        """
        EVALUATION.parse(name)
        async with self._database.transaction() as connection:
            evaluation = await self._resources.get(connection, name)
            if etag and etag != f'"{evaluation.revision}"':
                raise Aborted(
                    f'{name} has the etag "{evaluation.revision}", got {etag}; read it again',
                    metadata={"name": name, "etag": f'"{evaluation.revision}"'},
                )
            if evaluation.state in {*FINAL_STATES, EvaluationState.CANCELLING}:
                return evaluation
            await self._move(connection, evaluation, EvaluationState.CANCELLING)
            await self._queue.request_cancel(connection, name)
            return await self._resources.get(connection, name)

    async def predictions(self, name: str, first_row: int, limit: int) -> list[bytes]:
        """Return stored predictions from a row on.

        Raises:
            NotFound: no evaluation has this name.
            FailedPrecondition: it has not SUCCEEDED.
        """
        evaluation = await self.get(name)
        if evaluation.state is not EvaluationState.SUCCEEDED:
            raise FailedPrecondition(
                f"{name} must be SUCCEEDED to have predictions, it is {evaluation.state}",
                reason=Reason.WRONG_STATE,
                metadata={"name": name, "state": evaluation.state},
            )
        async with self._database.reading() as connection:
            return await self._predictions.read(connection, name, first_row, limit)

    async def find(self, connection: AsyncConnection, name: str) -> Evaluation:
        """Return the evaluation that a task works for."""
        return await self._resources.get(connection, name)

    async def begin(self, connection: AsyncConnection, name: str) -> None:
        """An attempt began."""
        evaluation = await self._resources.get(connection, name)
        if evaluation.state is EvaluationState.QUEUED:
            await self._move(connection, evaluation, EvaluationState.RUNNING)

    async def advance(self, connection: AsyncConnection, name: str, progress: Progress) -> None:
        """Show how far the evaluation has come."""
        evaluation = await self._resources.get(connection, name)
        await self._resources.update(connection, replace(evaluation, progress=progress))

    async def requeue(self, connection: AsyncConnection, name: str) -> None:
        """The attempt was lost."""
        evaluation = await self._resources.get(connection, name)
        waiting = replace(evaluation, progress=None)
        await self._move(connection, waiting, EvaluationState.QUEUED, "the attempt was lost")

    async def succeed(
        self,
        connection: AsyncConnection,
        name: str,
        *,
        arm_results: tuple[ArmResult, ...],
        comparisons: tuple[Comparison, ...],
        predictions: Sequence[bytes],
    ) -> None:
        """Store an outcome and every answer."""
        evaluation = await self._resources.get(connection, name)
        await self._predictions.replace(connection, name, predictions)
        scored = replace(
            evaluation, arm_results=arm_results, comparisons=comparisons, num_records=len(predictions)
        )
        await self._move(connection, scored, EvaluationState.SUCCEEDED)

    async def fail(self, connection: AsyncConnection, name: str, failure: Failure) -> None:
        """Store why it failed."""
        evaluation = await self._resources.get(connection, name)
        failed = replace(evaluation, failure=failure)
        await self._move(connection, failed, EvaluationState.FAILED, failure.message)

    async def end_cancelled(self, connection: AsyncConnection, name: str) -> None:
        """It stopped on request."""
        evaluation = await self._resources.get(connection, name)
        await self._move(connection, evaluation, EvaluationState.CANCELLED)

    async def _move(
        self, connection: AsyncConnection, evaluation: Evaluation, state: EvaluationState, why: str = ""
    ) -> None:
        stored = await self._resources.update(connection, moved(evaluation, state, datetime.now(UTC)))
        await self._log_state(connection, stored, why)

    async def _log_state(self, connection: AsyncConnection, evaluation: Evaluation, why: str = "") -> None:
        payload = StateChanged(
            state=evaluation.state,
            message=why,
            failure=evaluation.failure,
            final=evaluation.state in FINAL_STATES,
        )
        await self._log.append(connection, evaluation.name, [Entry(payload=payload)])


def _require_ready(thing: ModelFacts | VersionFacts) -> None:
    if not thing.ready:
        raise FailedPrecondition(
            f"{thing.name} must be READY, it is {thing.state}",
            reason=Reason.WRONG_STATE,
            metadata={"name": thing.name, "state": thing.state},
        )
