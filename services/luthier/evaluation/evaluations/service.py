"""What can be done with evaluations; plain values in and out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from itertools import accumulate
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, FailedPrecondition, Failure, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import Base, Contender, Taught, askings
from luthier.evaluation.evaluations.domain import (
    FINAL_STATES,
    AnswerFile,
    Evaluation,
    EvaluationState,
    Outcome,
    PredictionFile,
    Progress,
    check_evaluation,
    moved,
)
from luthier.evaluation.evaluations.prediction_file import read_predictions
from luthier.evaluation.evaluations.repository import AnswerFiles, Predictions
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.runtime.names import Pattern, check_id, new_id, require_project, same_project
from luthier.storage.blobs import BlobStore
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
    """What an evaluation needs to know of a model; `base_model` is empty for base models.

    `taught` is None for base models, and for tuned ones whose way of teaching is not known any more.
    `eos_token_ids` are empty for tuned models, and for base models of before they were kept.
    """

    name: str
    ready: bool
    state: str
    digest: str
    base_model: str
    has_chat_template: bool
    taught: Taught | None = None
    eos_token_ids: tuple[int, ...] = ()

    def as_base(self, today: date) -> Base:
        """Return what decides how arms on this base model are asked."""
        return Base(has_chat_template=self.has_chat_template, eos_token_ids=self.eos_token_ids, today=today)


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
        blobs: BlobStore,
    ) -> None:
        self._database = database
        self._resources = resources
        self._predictions = Predictions()
        self._answers = AnswerFiles()
        self._log = log
        self._queue = queue
        self._peers = peers
        self._blobs = blobs
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
        models = {
            name: await self._peers.model(name) for name in dict.fromkeys(arm.model for arm in draft.arms)
        }
        for model in models.values():
            _require_ready(model)
        digests = {model.name: model.digest for model in models.values()}
        bases = {models[arm.model].base_model or arm.model: arm.arm_id for arm in draft.arms}
        if len(bases) > 1:
            shown = ", ".join(f"{arm_id}: {base}" for base, arm_id in bases.items())
            raise InvalidArgument.of_fields(
                FieldViolation(
                    field="evaluation.arms", description=f"all arms must share one base model, got {shown}"
                )
            )
        base_model = next(iter(bases))
        base = models.get(base_model) or await self._peers.model(base_model)
        _require_ready(base)
        contenders = tuple(
            Contender(
                arm_id=arm.arm_id,
                chat_template=arm.chat_template,
                template=arm.template,
                taught=models[arm.model].taught,
            )
            for arm in draft.arms
        )
        return replace(
            draft,
            base_model=base_model,
            dataset_digest=version.digest,
            model_digests={**digests, base.name: base.digest},
            askings=askings(contenders, base.as_base(datetime.now(UTC).date())),
        )

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
        async with self._database.transaction(makes_room=True) as connection:
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

    async def predictions(
        self, evaluation: Evaluation, first_row: int, limit: int, limit_bytes: int
    ) -> list[bytes]:
        """Return stored predictions from a row on: at most `limit`, and one at least of what `limit_bytes` hold.

        Raises:
            FailedPrecondition: it has not SUCCEEDED, nor ended otherwise after some of them.
            DataLoss: they are not what was stored.
        """
        if evaluation.state is not EvaluationState.SUCCEEDED and evaluation.predictions is None:
            raise FailedPrecondition(
                f"{evaluation.name} must be SUCCEEDED to have predictions, it is {evaluation.state}",
                reason=Reason.WRONG_STATE,
                metadata={"name": evaluation.name, "state": evaluation.state},
            )
        if evaluation.predictions is not None:
            return await read_predictions(self._blobs, evaluation.predictions, first_row, limit, limit_bytes)
        async with self._database.reading() as connection:
            rows = await self._predictions.read(connection, evaluation.name, first_row, limit)
        total_bytes = accumulate(map(len, rows))
        return rows[: max(1, sum(size <= limit_bytes for size in total_bytes))]

    async def find(self, connection: AsyncConnection, name: str) -> tuple[Evaluation, list[AnswerFile]]:
        """Return the evaluation that a task works for, and the answers that earlier attempts kept."""
        return await self._resources.get(connection, name), await self._answers.read(connection, name)

    async def keep_answers(
        self, connection: AsyncConnection, name: str, step: int, files: Sequence[AnswerFile]
    ) -> None:
        """Keep answers for the attempts after this one. The same step again changes nothing."""
        await self._answers.add(connection, name, step, files)

    async def begin(self, connection: AsyncConnection, name: str) -> None:
        """An attempt began."""
        evaluation = await self._resources.get(connection, name)
        if evaluation.state is EvaluationState.QUEUED:
            await self._move(connection, evaluation, EvaluationState.RUNNING)

    async def advance(self, connection: AsyncConnection, name: str, progress: Progress) -> None:
        """Show how far the evaluation has come."""
        evaluation = await self._resources.get(connection, name)
        await self._resources.report(connection, replace(evaluation, progress=progress))

    async def requeue(self, connection: AsyncConnection, name: str) -> None:
        """The attempt was lost."""
        evaluation = await self._resources.get(connection, name)
        waiting = replace(evaluation, progress=None)
        await self._move(connection, waiting, EvaluationState.QUEUED, "the attempt was lost")

    async def succeed(
        self,
        connection: AsyncConnection,
        name: str,
        outcome: Outcome,
    ) -> None:
        """Store an outcome and where every answer is."""
        evaluation = await self._resources.get(connection, name)
        scored = replace(
            evaluation,
            arm_results=outcome.arm_results,
            comparisons=outcome.comparisons,
            warnings=outcome.warnings,
            num_records=outcome.predictions.num_rows,
            predictions=outcome.predictions,
        )
        await self._move(connection, scored, EvaluationState.SUCCEEDED)

    async def fail(
        self, connection: AsyncConnection, name: str, failure: Failure, predictions: PredictionFile | None
    ) -> None:
        """Store why it failed, and the answers that came before."""
        evaluation = await self._resources.get(connection, name)
        failed = replace(_with_answers(evaluation, predictions), failure=failure)
        await self._move(connection, failed, EvaluationState.FAILED, failure.message)

    async def end_cancelled(
        self, connection: AsyncConnection, name: str, predictions: PredictionFile | None
    ) -> None:
        """It stopped on request; store the answers that came before."""
        evaluation = await self._resources.get(connection, name)
        stopped = _with_answers(evaluation, predictions)
        await self._move(connection, stopped, EvaluationState.CANCELLED)

    async def _move(
        self, connection: AsyncConnection, evaluation: Evaluation, state: EvaluationState, why: str = ""
    ) -> None:
        stored = await self._resources.update(connection, moved(evaluation, state, datetime.now(UTC)))
        if state in FINAL_STATES:
            await self._answers.forget(connection, evaluation.name)
        await self._log_state(connection, stored, why)

    async def _log_state(self, connection: AsyncConnection, evaluation: Evaluation, why: str = "") -> None:
        payload = StateChanged(
            state=evaluation.state,
            message=why,
            failure=evaluation.failure,
            final=evaluation.state in FINAL_STATES,
        )
        await self._log.append(connection, evaluation.name, [Entry(payload=payload)])


def _with_answers(evaluation: Evaluation, predictions: PredictionFile | None) -> Evaluation:
    if predictions is None:
        return evaluation
    return replace(evaluation, predictions=predictions, num_records=predictions.num_rows)


def _require_ready(thing: ModelFacts | VersionFacts) -> None:
    if not thing.ready:
        raise FailedPrecondition(
            f"{thing.name} must be READY, it is {thing.state}",
            reason=Reason.WRONG_STATE,
            metadata={"name": thing.name, "state": thing.state},
        )
