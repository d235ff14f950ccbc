"""What can be done with evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure
from luthier.errors.status import failure_to_status
from luthier.evaluation import reward_models
from luthier.evaluation.access import Access
from luthier.evaluation.asking import askings
from luthier.evaluation.bases import bases_of, require_same_tokens, side_by_side
from luthier.evaluation.evaluations import repository, rules
from luthier.evaluation.evaluations.drift_rules import pin_suite, require_templates
from luthier.evaluation.evaluations.judge_rules import (
    judge_askings,
    judge_field,
    judging_arms,
    require_calls,
)
from luthier.evaluation.evaluations.metric_rules import fitted, require_measurable
from luthier.evaluation.evaluations.predictions import PredictionReader, StoredEvaluation, covered
from luthier.evaluation.evaluations.rules import State
from luthier.evaluation.lineage import Origins, learnt_from
from luthier.evaluation.precision import shared_precision
from luthier.evaluation.ready import require_askable, require_ready
from luthier.evaluation.shares import dealt
from luthier.runtime.names import child_name
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile, ShareRow
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.v1.event_pb2 import Progress
from luthier.v1.reference_pb2 import Reference
from luthier.work.elsewhere import Elsewhere
from luthier.work.families import Family, Needs, Tasks, Work
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.log import EventLog
from luthier.work.row_file import found_rows
from luthier.work.tasks import TaskKind
from luthier.work.webhooks.targets import Targets
from luthier.worker.v1.task_pb2 import AnswerShare, BlobFile, EvaluateResult, EvaluateSpec, TrainingVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What lies outside of the service, as far as evaluations need it.

    Attributes:
        peers: where records and models are.
        elsewhere: what they hold of other services.
        webhooks: where they may tell that they have ended.
        access: whom judges and graders may ask outside of Luthier.
    """

    peers: Origins
    elsewhere: Elsewhere
    webhooks: Targets
    access: Access


class EvaluationService:
    """Use cases of evaluations. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        blobs: BlobStore,
        outside: Outside,
        keeping: Keeping,
    ) -> None:
        self._database = database
        self._peers = outside.peers
        self._blobs = blobs
        self._elsewhere = outside.elsewhere
        self._webhooks = outside.webhooks
        self._access = outside.access
        self._rows = repository.evaluations()
        self._answers = repository.AnswerFiles()
        self._shares = repository.Shares()
        lifecycle = Lifecycle(Evaluation.State.DESCRIPTOR, rules.TRANSITIONS)
        self.family = Family(self._rows, lifecycle, database, log, tasks, keeping)
        self.predictions = PredictionReader(database, blobs, lifecycle)

    async def create(self, request: CreateEvaluationRequest) -> Evaluation:
        """Queue an evaluation: as one task, or as one for each share that it is dealt in.

        Raises InvalidArgument (also ADDRESS_NOT_ALLOWED for a webhook, a judge or a grader,
        and KEY_NOT_ALLOWED for a judge), NotFound for a version or a model, FailedPrecondition when one of them is not
        READY or there is nothing to ask, AlreadyExists, ResourceExhausted DISK_FULL, and Unavailable when another
        service is away.
        """
        evaluation = rules.resolved(request.evaluation)
        name = child_name(
            request.parent, "evaluations", request.evaluation_id, field="evaluation_id", prefix="evaluation"
        )
        evaluation.name = name
        rules.check(evaluation)
        rules.check_references(evaluation)
        self._access.require(evaluation)
        self._webhooks.require(evaluation.webhooks, "evaluation.webhooks")
        self._database.disk.require_room()
        # Before the transaction: nobody else could write while other services make up their minds.
        evaluation, private, learnt, num_records = await self._pinned(evaluation, request.evaluation)
        arms = chain(*side_by_side(evaluation.arms, lambda arm: arm.base_model))
        shares = dealt([arm.arm_id for arm in arms], num_records, evaluation.max_workers)
        async with (
            self._elsewhere.holding(name, (*evaluation.references, *learnt)) as holds,
            self._database.transaction() as connection,
        ):
            needs = Needs(elsewhere=holds)
            stored = await self.family.add(connection, evaluation, private, needs=needs)
            await self._queue(connection, stored, shares)
            return stored.message

    async def _queue(
        self, connection: AsyncConnection, evaluation: StoredEvaluation, shares: Sequence[AnswerShare]
    ) -> None:
        """Queue a task for each share; a single one is the whole, whose worker scores it too."""
        if len(shares) == 1:
            await self.close(connection, evaluation)
            return
        for share in shares:
            row = ShareRow(share=share, state=ShareRow.STATE_QUEUED)
            await self._shares.put(connection, evaluation.uid, row)
            work = _work(evaluation, TaskKind.ANSWER_SHARE, share.number)
            await self.family.assign(connection, evaluation, work)

    async def close(self, connection: AsyncConnection, evaluation: StoredEvaluation) -> None:
        """Queue what is left of an evaluation: answers that it does not have, and its outcome."""
        await self.family.assign(connection, evaluation, _work(evaluation, TaskKind.EVALUATE))

    async def _pinned(
        self, evaluation: Evaluation, wanted: Evaluation
    ) -> tuple[Evaluation, EvaluationPrivate, Sequence[Reference], int]:
        """Return an evaluation with all that it builds on, what its tuned models learnt from, and its record count.

        `wanted` is the evaluation as it was asked for.
        """
        version = await self._peers.version(evaluation.dataset_version)
        require_ready(version)
        num_records = rules.require_records(evaluation, version)
        require_calls(evaluation, num_records)
        judges = judging_arms(evaluation)
        every = [*evaluation.arms, *judges]
        models = {name: await self._peers.model(name) for name in dict.fromkeys(arm.model for arm in every)}
        for index, arm in enumerate(evaluation.arms):
            require_askable(models[arm.model], f"evaluation.arms[{index}].model")
        for judge in judges:
            require_askable(models[judge.model], judge_field(evaluation, judge.arm_id))
        for name in bases_of(every, models):
            if name not in models:
                models[name] = await self._peers.model(name)
        for model in models.values():
            require_ready(model)
        evaluation = fitted(evaluation, wanted, version, models)
        rules.check(evaluation)
        require_measurable(evaluation, version)
        require_same_tokens(evaluation, models)
        today = datetime.now(UTC).date()
        asked = askings(evaluation.arms, models, today)
        evaluation.base_precision = shared_precision(evaluation.base_precision, every, models)
        filled = rules.pinned(evaluation, version, models)
        if filled.drift.dataset_version:
            suite = await self._peers.version(filled.drift.dataset_version)
            require_ready(suite)
            pin_suite(filled, suite)
        require_templates(filled, asked, models)
        learnt = await learnt_from((models[arm.model] for arm in filled.arms if arm.tuned), self._peers)
        rewards = await reward_models.find(self._peers, reward_models.named_by(filled))
        reward_models.pin(filled, rewards.values())
        private = EvaluationPrivate(
            reward_models=[one.told(today) for one in rewards.values()],
            askings=asked,
            judge_askings=judge_askings(filled, models, today),
            training_versions=[TrainingVersion(name=one.name, digest=one.digest) for one in learnt.versions],
            unknown_models=learnt.unknown,
        )
        return filled, private, learnt.versions, num_records

    async def spec(self, connection: AsyncConnection, uid: str) -> EvaluateSpec:
        """Return what a worker is to do, with the answers that earlier attempts kept."""
        evaluation = await self.family.of_uid(connection, uid)
        answers = await self._answers.read(connection, evaluation.uid)
        return rules.spec(evaluation.message, evaluation.private, answers)

    async def keep_answers(
        self, connection: AsyncConnection, uid: str, share: int, step: int, files: Sequence[BlobFile]
    ) -> None:
        """Keep answers for the attempts after this one; share 0 is the whole. The same step again changes nothing."""
        evaluation = await self.family.of_uid(connection, uid)
        await self._answers.add(connection, evaluation.uid, share, step, files)

    async def begin(self, connection: AsyncConnection, uid: str) -> None:
        """A worker began, with the whole or with a share: others may be at work already."""
        evaluation = await self.family.of_uid(connection, uid)
        if evaluation.message.state == State.STATE_RUNNING:
            await self.family.show_waiting(connection, uid, None)
        else:
            await self.family.move(connection, evaluation, State.STATE_RUNNING)

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
        await self._forget(connection, uid)

    async def fail(
        self, connection: AsyncConnection, uid: str, failure: Failure, result: EvaluateResult | None
    ) -> None:
        """Store why it failed, and the answers that came before. Raises as `succeed`."""
        evaluation = await self.family.of_uid(connection, uid)
        changed, private = await self._with_answers(connection, evaluation, result)
        changed.error.CopyFrom(failure_to_status(failure))
        await self.family.move(
            connection,
            evaluation,
            State.STATE_FAILED,
            changed=changed,
            private=private,
            why=failure.message,
        )
        await self._forget(connection, uid)

    async def end_cancelled(
        self, connection: AsyncConnection, uid: str, result: EvaluateResult | None
    ) -> None:
        """It stopped on request; store the answers that came before. Raises as `succeed`."""
        evaluation = await self.family.of_uid(connection, uid)
        changed, private = await self._with_answers(connection, evaluation, result)
        await self.family.move(
            connection, evaluation, State.STATE_CANCELLED, changed=changed, private=private
        )
        await self._forget(connection, uid)

    async def _forget(self, connection: AsyncConnection, uid: str) -> None:
        """Drop what only an evaluation needs that has not ended."""
        await self._answers.forget(connection, uid)
        await self._shares.forget(connection, uid)

    async def _with_answers(
        self, connection: AsyncConnection, evaluation: StoredEvaluation, result: EvaluateResult | None
    ) -> tuple[Evaluation, EvaluationPrivate]:
        """Return an evaluation with the answers that a result brings, or else with those of its shares."""
        changed = evaluation.copy()
        if result is None or not result.HasField("predictions"):
            private = evaluation.copy_private()
            for row in await self._shares.read(connection, evaluation.uid):
                if row.HasField("predictions"):
                    private.parts.append(row.predictions)
            changed.num_records = sum(map(len, covered(private.parts)))
            return changed, private
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
            judge_askings=private.judge_askings,
            training_versions=private.training_versions,
            unknown_models=private.unknown_models,
            predictions=PredictionFile(
                sha256=file.sha256, size_bytes=file.size_bytes, num_rows=file.num_rows
            ),
        )


def _work(evaluation: StoredEvaluation, kind: TaskKind, share: int = 0) -> Work:
    message = evaluation.message
    learnt = (one.name for one in evaluation.private.training_versions)
    suites = filter(None, (message.drift.dataset_version,))
    versions = dict.fromkeys((message.dataset_version, *suites, *learnt))
    return Work(kind=kind, resources=(*versions, *sorted(message.model_digests)), share=share)
