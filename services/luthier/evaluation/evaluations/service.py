"""What can be done with evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate

from google.protobuf.message import DecodeError
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import DataLoss, FailedPrecondition, Failure, Reason
from luthier.errors.status import failure_to_status
from luthier.evaluation.asking import askings
from luthier.evaluation.evaluations import repository, rules
from luthier.evaluation.evaluations.rules import State
from luthier.evaluation.lineage import Origins, learnt_from
from luthier.evaluation.precision import shared_precision
from luthier.evaluation.ready import require_askable, require_ready
from luthier.runtime.names import child_name
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.v1.event_pb2 import Progress
from luthier.v1.reference_pb2 import Reference
from luthier.work.elsewhere import Elsewhere
from luthier.work.families import Family, Needs, Tasks, Work
from luthier.work.lifecycle import Lifecycle
from luthier.work.log import EventLog
from luthier.work.row_file import RowFile, found_rows, read_rows
from luthier.work.tasks import TaskKind
from luthier.worker.v1.task_pb2 import BlobFile, EvaluateResult, EvaluateSpec, TrainingVersion

StoredEvaluation = Stored[Evaluation, EvaluationPrivate]


class EvaluationService:
    """Use cases of evaluations. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        peers: Origins,
        blobs: BlobStore,
        elsewhere: Elsewhere,
    ) -> None:
        self._database = database
        self._peers = peers
        self._blobs = blobs
        self._elsewhere = elsewhere
        self._rows = repository.evaluations()
        self._predictions = repository.Predictions()
        self._answers = repository.AnswerFiles()
        lifecycle = Lifecycle(Evaluation.State.DESCRIPTOR, rules.TRANSITIONS)
        self.family = Family(self._rows, lifecycle, database, log, tasks)

    async def create(self, request: CreateEvaluationRequest) -> Evaluation:
        """Queue an evaluation.

        Raises InvalidArgument (also CROSS_PROJECT_REFERENCE), NotFound for a version or a model, FailedPrecondition
        when one of them is not READY or there is nothing to ask, AlreadyExists, ResourceExhausted DISK_FULL, and
        Unavailable when another service is away.
        """
        evaluation = rules.resolved(request.evaluation)
        name = child_name(
            request.parent, "evaluations", request.evaluation_id, field="evaluation_id", prefix="evaluation"
        )
        evaluation.name = name
        rules.check(evaluation)
        rules.check_references(request.parent, evaluation)
        self._database.disk.require_room()
        # Before the transaction: nobody else could write while other services make up their minds.
        evaluation, private, learnt = await self._pinned(evaluation)
        versions = dict.fromkeys((evaluation.dataset_version, *(one.name for one in learnt)))
        work = Work(kind=TaskKind.EVALUATE, resources=(*versions, *sorted(evaluation.model_digests)))
        async with (
            self._elsewhere.holding(name, (*evaluation.references, *learnt)) as holds,
            self._database.transaction() as connection,
        ):
            needs = Needs(elsewhere=holds)
            return (await self.family.add(connection, evaluation, private, work, needs)).message

    async def _pinned(
        self, evaluation: Evaluation
    ) -> tuple[Evaluation, EvaluationPrivate, Sequence[Reference]]:
        """Return an evaluation with all that it builds on, and the versions that its tuned models learnt from."""
        version = await self._peers.version(evaluation.dataset_version)
        require_ready(version)
        rules.require_records(evaluation, version)
        models = {
            name: await self._peers.model(name)
            for name in dict.fromkeys(arm.model for arm in evaluation.arms)
        }
        for index, arm in enumerate(evaluation.arms):
            require_askable(models[arm.model], f"evaluation.arms[{index}].model")
        base_model = rules.shared_base(evaluation.arms, models)
        if base_model not in models:
            models[base_model] = await self._peers.model(base_model)
        for model in models.values():
            require_ready(model)
        today = datetime.now(UTC).date()
        asked = askings(evaluation.arms, models, models[base_model], today)
        evaluation.base_precision = shared_precision(evaluation.base_precision, evaluation.arms, models)
        filled = rules.pinned(evaluation, version, models)
        learnt = await learnt_from((models[arm.model] for arm in filled.arms if arm.tuned), self._peers)
        private = EvaluationPrivate(
            base_model=base_model,
            askings=asked,
            training_versions=[TrainingVersion(name=one.name, digest=one.digest) for one in learnt.versions],
            unknown_models=learnt.unknown,
        )
        return filled, private, learnt.versions

    async def predictions(
        self, evaluation: StoredEvaluation, first_row: int, limit: int, limit_bytes: int
    ) -> list[Prediction]:
        """Return predictions from a row on: at most `limit`, and one at least of what `limit_bytes` hold.

        Raises:
            FailedPrecondition: it has not SUCCEEDED, nor ended otherwise after some of them.
            DataLoss: they are not what was stored.
        """
        message, private = evaluation.message, evaluation.private
        if private.HasField("predictions"):
            kept = private.predictions
            file = RowFile(sha256=kept.sha256, size_bytes=kept.size_bytes, num_rows=kept.num_rows)
            rows = await read_rows(self._blobs, file, first_row, limit, limit_bytes)
            return [_prediction(row) for row in rows]
        if message.state != State.STATE_SUCCEEDED:
            state = self.family.lifecycle.name(message.state)
            raise FailedPrecondition(
                f"{message.name} must be SUCCEEDED to have predictions, it is {state}",
                reason=Reason.WRONG_STATE,
                metadata={"name": message.name, "state": state},
            )
        async with self._database.reading() as connection:
            rows = await self._predictions.read(connection, evaluation.uid, first_row, limit)
        total_bytes = accumulate(map(len, rows))
        fitting = max(1, sum(size <= limit_bytes for size in total_bytes))
        return [_prediction(row) for row in rows[:fitting]]

    async def spec(self, connection: AsyncConnection, uid: str) -> EvaluateSpec:
        """Return what a worker is to do, with the answers that earlier attempts kept."""
        evaluation = await self.family.of_uid(connection, uid)
        answers = await self._answers.read(connection, evaluation.uid)
        return rules.spec(evaluation.message, evaluation.private, answers)

    async def keep_answers(
        self, connection: AsyncConnection, uid: str, step: int, files: Sequence[BlobFile]
    ) -> None:
        """Keep answers for the attempts after this one. The same step again changes nothing."""
        evaluation = await self.family.of_uid(connection, uid)
        await self._answers.add(connection, evaluation.uid, step, files)

    async def advance(self, connection: AsyncConnection, uid: str, progress: Progress) -> None:
        """Show how far the evaluation has come."""
        evaluation = await self.family.of_uid(connection, uid)
        changed = evaluation.copy()
        changed.progress.CopyFrom(progress)
        await self._rows.report(connection, evaluation, changed)

    async def requeue(self, connection: AsyncConnection, uid: str) -> None:
        """The attempt was lost."""
        evaluation = await self.family.of_uid(connection, uid)
        changed = evaluation.copy()
        changed.ClearField("progress")
        why = "the attempt was lost"
        await self.family.move(connection, evaluation, State.STATE_QUEUED, changed=changed, why=why)

    async def succeed(self, connection: AsyncConnection, uid: str, result: EvaluateResult) -> None:
        """Store an outcome and where every answer is. Raises InvalidArgument for a result that contradicts itself."""
        evaluation = await self.family.of_uid(connection, uid)
        private = await self._with_predictions(evaluation.private, result)
        changed = rules.scored(evaluation.message, result)
        await self.family.move(
            connection, evaluation, State.STATE_SUCCEEDED, changed=changed, private=private
        )
        await self._answers.forget(connection, evaluation.uid)

    async def fail(
        self, connection: AsyncConnection, uid: str, failure: Failure, result: EvaluateResult | None
    ) -> None:
        """Store why it failed, and the answers that came before. Raises as `succeed`."""
        evaluation = await self.family.of_uid(connection, uid)
        changed, private = await self._with_answers(evaluation, result)
        changed.error.CopyFrom(failure_to_status(failure))
        await self.family.move(
            connection,
            evaluation,
            State.STATE_FAILED,
            changed=changed,
            private=private,
            why=failure.message,
        )
        await self._answers.forget(connection, evaluation.uid)

    async def end_cancelled(
        self, connection: AsyncConnection, uid: str, result: EvaluateResult | None
    ) -> None:
        """It stopped on request; store the answers that came before. Raises as `succeed`."""
        evaluation = await self.family.of_uid(connection, uid)
        changed, private = await self._with_answers(evaluation, result)
        await self.family.move(
            connection, evaluation, State.STATE_CANCELLED, changed=changed, private=private
        )
        await self._answers.forget(connection, evaluation.uid)

    async def _with_answers(
        self, evaluation: StoredEvaluation, result: EvaluateResult | None
    ) -> tuple[Evaluation, EvaluationPrivate]:
        changed = evaluation.copy()
        if result is None or not result.HasField("predictions"):
            return changed, evaluation.private
        changed.num_records = result.num_records
        return changed, await self._with_predictions(evaluation.private, result)

    async def _with_predictions(
        self, private: EvaluationPrivate, result: EvaluateResult
    ) -> EvaluationPrivate:
        file = await found_rows(
            self._blobs, result.predictions.sha256, result.num_records, "result.evaluate.predictions"
        )
        return EvaluationPrivate(
            base_model=private.base_model,
            askings=private.askings,
            training_versions=private.training_versions,
            unknown_models=private.unknown_models,
            predictions=PredictionFile(
                sha256=file.sha256, size_bytes=file.size_bytes, num_rows=file.num_rows
            ),
        )


def _prediction(row: bytes) -> Prediction:
    try:
        return rules.judged(Prediction.FromString(row))
    except DecodeError as error:
        raise DataLoss(f"a stored prediction of {len(row)} bytes cannot be read: {error}") from error
