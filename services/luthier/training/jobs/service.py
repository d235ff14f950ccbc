"""What can be done with fine-tuning jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.errors import AlreadyExists, LuthierError, NotFound, Reason, ResourceExhausted
from luthier.grading.asked import remote_addresses
from luthier.runtime.names import child_name, new_id
from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.jobs import repository, rules
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.counting import estimate_warnings, survey_elsewhere
from luthier.training.jobs.fits import add_fit, check_device, counted_rows, shape_in, trained_in
from luthier.training.jobs.planning import (
    SplitLengths,
    check_counts,
    joined,
    make_plan,
    require_learnable,
    require_usable,
)
from luthier.training.jobs.ranks import is_cut_for_ranks, require_rows_for_ranks
from luthier.training.jobs.reinforcement import GRADER_FIELD, answer_tokens
from luthier.training.jobs.reward_models import (
    RewardModel,
    RewardModels,
    check_reward_models,
    require_room,
    reward_warnings,
)
from luthier.training.jobs.rollouts import KeptRollouts
from luthier.training.jobs.room import least_rows, require_worker_with_room, room_warnings
from luthier.training.jobs.row_places import RowPlaces, placed
from luthier.training.jobs.rules import State
from luthier.training.jobs.split_counts import longest_prompt
from luthier.training.jobs.starts import Start, Starts, require_base
from luthier.training.names import RENDERING
from luthier.training.recipe_settings import batch_settings, mixture_of, ranks_of, rendering_names
from luthier.training.recipes.footprint import Trained
from luthier.training.recipes.survey import Survey
from luthier.training.weights import StoredModel
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, FineTuningPlan, MetricPoint
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.training_service_pb2 import CreateFineTuningJobRequest, PlanFineTuningJobRequest
from luthier.work.elsewhere import Elsewhere
from luthier.work.families import Family, Needs, Work
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, Live, told_apart
from luthier.work.log import EventLog
from luthier.work.pausing import PausableTasks, PauseStates, Pausing
from luthier.work.requirements import read_requirements
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.waiting import Present
from luthier.work.webhooks.targets import Targets

MAX_PLANS = 8
"""Plans that are counted or wait for it; more are refused."""
_PLAN_RETRY_SECONDS = 2.0
FILTERS = ("state", "labels", "base_model", "rendering")


class Renderings(RowPlaces, Protocol):
    """Where jobs find their rows."""

    async def get(self, name: str) -> Rendering:
        """Return a rendering. Raises NotFound, and Unavailable when its service is away."""
        ...

    async def lengths(self, name: str) -> SplitLengths:
        """Return the row lengths of a READY rendering. Raises as `get`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What lies outside of the service, as far as jobs need it.

    Attributes:
        renderings: where jobs find their rows.
        elsewhere: what they hold of other services.
        rewards: which reward services their graders may ask.
        webhooks: where they may tell that they have ended.
        workers: which workers are heard of.
    """

    renderings: Renderings
    elsewhere: Elsewhere
    rewards: RewardAddresses
    webhooks: Targets
    workers: Present


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """A job that nothing known in an instant speaks against, all defaults filled in, and what it builds on.

    `renderings` are its own and those that are mixed in; `start` is None where it begins anew on the base model;
    `reward_models` are those that its grader names.
    """

    job: FineTuningJob
    renderings: Sequence[Rendering]
    base_model: StoredModel
    start: Start | None
    reward_models: Sequence[RewardModel]


def _private_of(checked: CheckedJob) -> FineTuningJobPrivate:
    own, *mixed = checked.renderings
    return FineTuningJobPrivate(
        base_model_digest=checked.base_model.message.digest,
        rendering_digest=own.digest,
        mixed_rendering_digests=[rendering.digest for rendering in mixed],
        taught=rules.taught_by(own),
        start_files=checked.start.files if checked.start else (),
        has_own_template=not own.chat_template,
    )


class JobService:
    """Use cases of jobs. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: PausableTasks,
        models: Models,
        outside: Outside,
        blobs: BlobStore,
        keeping: Keeping,
    ) -> None:
        self._database = database
        self._log = log
        self._models = models
        self._renderings = outside.renderings
        self._elsewhere = outside.elsewhere
        self._rewards = outside.rewards
        self._webhooks = outside.webhooks
        self._workers = outside.workers
        self._counting = asyncio.Semaphore(1)
        self._num_plans = 0
        lifecycle = Lifecycle(FineTuningJob.State.DESCRIPTOR, rules.TRANSITIONS)
        self.family = Family(repository.jobs(), lifecycle, database, log, tasks, keeping)
        states = PauseStates(
            queued=State.STATE_QUEUED, pausing=State.STATE_PAUSING, paused=State.STATE_PAUSED
        )
        self.pausing = Pausing(self.family, database, tasks, states)
        self._blobs = blobs
        self._starts = Starts(models, self.family, blobs)
        self._reward_models = RewardModels(models, self.family)
        self._checkpoints = repository.Checkpoints()
        self._metrics = repository.Metrics()
        self.rollouts = KeptRollouts(database, blobs)

    async def check(self, wanted: FineTuningJob, *, names_rows: bool = False) -> CheckedJob:
        """Check a job by what is known of its base model and its renderings, without looking at rows.

        With `names_rows` they are looked at where one of them is too long, to say which.

        Raises:
            InvalidArgument: names every field that is wrong; ADDRESS_NOT_ALLOWED for a remote grader or a webhook;
                REWARD_MODEL_EXPECTED; SEQUENCE_TOO_LONG.
            NotFound: the model, what to begin from, a reward model or a rendering does not exist.
            FailedPrecondition: one of them is not READY, they do not fit, TOKENIZER_MISMATCH, NO_SUPERVISED_TOKENS, or
                TOO_MANY_RANKS.
            Unavailable: the Data service is away.
        """
        rules.check_references(wanted)
        rules.check_job(wanted)
        check_reward_models(wanted)
        for field, address in remote_addresses(wanted.reinforcement.grader, GRADER_FIELD):
            self._rewards.require(address, field)
        self._webhooks.require(wanted.webhooks, "fine_tuning_job.webhooks")
        async with self._database.reading() as connection:
            start = await self._starts.find(connection, wanted.start_from) if wanted.start_from else None
        job = rules.resolved(wanted if start is None else await self._starts.begun(wanted, start))
        async with self._database.reading() as connection:
            base = await self._models.find_base(connection, job.base_model)
            rewards = await self._reward_models.find(connection, job, base)
        if start is not None:
            require_base(start, base)
        renderings = [await self._renderings.get(name) for name in rendering_names(job)]
        for rendering in renderings:
            require_usable(job, rendering, base.message.tokenizer_digest)
        try:
            check_counts(job, renderings, base.message.context_length)
        except LuthierError as error:
            if not names_rows or error.reason != Reason.SEQUENCE_TOO_LONG:
                raise
            raise await self._longest_named(job, renderings, base.message.context_length, error) from error
        require_rows_for_ranks(job, renderings)
        require_room(job, rewards, longest_prompt(renderings[0]))
        return CheckedJob(job=job, renderings=renderings, base_model=base, start=start, reward_models=rewards)

    async def plan(self, request: PlanFineTuningJobRequest) -> FineTuningPlan:
        """Say what a job would do, having looked at the length of every row, and what it takes on a device.

        Raises as `check`, FailedPrecondition DOES_NOT_FIT where the device's memory is known and does not suffice.
        Takes some seconds, in another process, whatever the number of rows; one plan is counted at a time.
        More than `MAX_PLANS` at once are refused: ResourceExhausted OVERLOADED.
        """
        check_device(request.device)
        checked = await self.check(request.fine_tuning_job, names_rows=True)
        found = await self._surveyed(checked.job)
        context_length = checked.base_model.message.context_length
        try:
            made = make_plan(checked.job, checked.renderings, found, context_length)
        except LuthierError as error:
            raise await placed(error, checked.job.rendering, self._renderings) from error
        made.warnings.extend(estimate_warnings(found, checked.job.hyperparameters.max_steps))
        made.warnings.extend(reward_warnings(checked.reward_models, checked.renderings[0]))
        trained = await self._trained(checked)
        if trained is not None and found.totals is not None:
            rows = counted_rows(checked.job, found, checked.renderings)
            add_fit(made, request.device, trained, rows, found.totals)
            if not request.HasField("device"):
                made.warnings.extend(room_warnings(self._workers.present(), checked.job, trained, rows))
        return made

    async def _longest_named(
        self, job: FineTuningJob, renderings: Sequence[Rendering], context_length: int, refused: LuthierError
    ) -> LuthierError:
        """Return what the rows themselves are refused for, with the place of the longest."""
        try:
            require_learnable(job, renderings, await self._surveyed(job), context_length)
        except LuthierError as error:
            if error.reason == Reason.SEQUENCE_TOO_LONG:
                return await placed(error, job.rendering, self._renderings)
        return refused

    async def _surveyed(self, job: FineTuningJob) -> Survey:
        """Look at the length of every row. Raises ResourceExhausted OVERLOADED, and as renderings do."""
        if self._num_plans >= MAX_PLANS:
            raise ResourceExhausted(
                f"{self._num_plans} plans are being counted, one after the other; call again later",
                reason=Reason.OVERLOADED,
                retry_after_seconds=_PLAN_RETRY_SECONDS,
            )
        self._num_plans += 1
        try:
            async with self._counting:
                parts = [await self._renderings.lengths(name) for name in rendering_names(job)]
                lengths, firsts = joined(parts)
                return await survey_elsewhere(
                    lengths.train,
                    lengths.validation,
                    batch_settings(job),
                    answer_tokens(job),
                    mixture_of(job, firsts),
                    is_cut=is_cut_for_ranks(job),
                )
        finally:
            self._num_plans -= 1

    async def _require_room(self, checked: CheckedJob) -> None:
        """Refuse a job that is too large for every worker that is there. Raises as `require_worker_with_room`."""
        trained = await self._trained(checked)
        if trained is not None:
            rows = least_rows(checked.job, checked.renderings)
            require_worker_with_room(self._workers.present(), checked.job, trained, rows)

    async def _trained(self, checked: CheckedJob) -> Trained | None:
        """Return what a job trains; None where the base model's files do not say its sizes. Raises as `trained_in`."""
        shape = await shape_in(self._blobs, checked.base_model)
        return None if shape is None else trained_in(checked.job, shape, checked.reward_models)

    async def create(self, request: CreateFineTuningJobRequest) -> FineTuningJob:
        """Queue a job; its worker looks at the rows while it is PREPARING.

        Raises as `check`, FailedPrecondition DOES_NOT_FIT where it is too large for every worker that is there and
        could be given it, AlreadyExists when a job or the tuned model's name is taken, ResourceExhausted DISK_FULL.
        """
        chosen_id = request.fine_tuning_job_id or new_id("job")
        name = child_name(
            request.parent, "fineTuningJobs", chosen_id, field="fine_tuning_job_id", prefix="job"
        )
        self._database.disk.require_room()
        checked = await self.check(request.fine_tuning_job)
        job = checked.job
        await self._require_room(checked)
        job.name = name
        job.state = State.STATE_QUEUED
        job.tuned_model_id = job.tuned_model_id or chosen_id
        private = await self._kept(checked)
        base, start = checked.base_model, checked.start
        tuned_model = f"{request.parent}/models/{job.tuned_model_id}"
        job.references.add(name=job.base_model, uid=base.uid, digest=base.message.digest)
        if start is not None and start.reference.name != job.base_model:
            job.references.add().CopyFrom(start.reference)
        read = [
            job.references.add(name=name, uid=rendering.uid, digest=rendering.digest)
            for name, rendering in zip(rendering_names(job), checked.renderings, strict=True)
        ]
        for one in checked.reward_models:
            message = one.model.message
            job.references.add(name=message.name, uid=one.model.uid, digest=message.digest)
        required = read_requirements(job.requirements, ranks_of(job)[0])
        work = Work(kind=TaskKind.TRAIN, resources=rendering_names(job), required=required)
        async with (
            self._elsewhere.holding(name, read) as holds,
            self._database.transaction() as connection,
        ):
            # As the transaction sees it: it may have been deleted meanwhile.
            await self._models.base(connection, base.uid)
            until_end = [base.uid]
            if start is not None:
                await self._starts.require(connection, start)
                until_end.append(start.reference.uid)
            await self._reward_models.require(connection, checked.reward_models)
            until_end.extend(uid for one in checked.reward_models for uid in one.uids)
            # Its checkpoints have no tokenizer of their own: as models they take that of the base.
            lasting = [base.uid] if job.HasField("full") else []
            needs = Needs(until_end=until_end, lasting=lasting, elsewhere=holds)
            stored = await self.family.add(connection, job, private, work, needs)
            if await self._models.exists(connection, tuned_model):
                raise AlreadyExists(
                    f"tuned_model_id must be new, {tuned_model} exists", metadata={"name": tuned_model}
                )
        return stored.message

    async def _kept(self, checked: CheckedJob) -> FineTuningJobPrivate:
        """Return what only the service knows of a new job, once the files by which its model is asked are stored.

        Before the transaction, and before the job that needs them: a blob that nobody needs is no harm.
        """
        private = _private_of(checked)
        await self._models.keep_template(private.taught)
        is_asked = not checked.job.HasField("reward_model")
        if is_asked and (
            kept := await self._models.keep_generation_config(checked.base_model, private.taught)
        ):
            private.generation_config.CopyFrom(kept)
        return private

    async def delete(self, name: str, etag: str) -> FineTuningJob:
        """Delete a job that has ended, when nothing needs it or one of its checkpoints. Raises as `Family.delete`."""
        return await self.family.delete(name, etag, self._checkpoints.uids)

    async def list_page(
        self, request: ListRequest, tokens: PageTokens
    ) -> tuple[tuple[FineTuningJob, ...], str]:
        """Return a page of a project's jobs and the next page's token.

        Raises InvalidArgument, and where a rendering is named Unavailable when the Data service is away.
        """
        live: Mapping[str, Live] = {"base_model": self._models.live, "rendering": self._live_rendering}
        return await self.family.page(request, tokens, filters=FILTERS, live=live)

    async def _live_rendering(self, name: str) -> Sequence[str]:
        RENDERING.parse(name, field="filter")
        try:
            rendering = await self._renderings.get(name)
        except NotFound:
            return ()
        return told_apart(rendering.uid, rendering.digest)

    async def metrics(self, uid: str, after_step: int, limit: int) -> Sequence[MetricPoint]:
        """Return at most `limit` metric points of the job of a uid after a step."""
        async with self._database.reading() as connection:
            return await self._metrics.after(connection, uid, after_step, limit)

    async def checkpoint(self, name: str) -> Checkpoint:
        """Return a checkpoint. Raises NotFound."""
        async with self._database.reading() as connection:
            return (await self._checkpoints.get(connection, name)).message

    async def checkpoints(self, uid: str, after_step: int, limit: int) -> Sequence[Checkpoint]:
        """Return at most `limit` checkpoints of the job of a uid after a step."""
        async with self._database.reading() as connection:
            found = await self._checkpoints.after(connection, uid, after_step, limit)
            return [checkpoint.message for checkpoint in found]
