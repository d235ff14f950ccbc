"""Reward models, or checkpoints of such, that a grader names: what they may be, and what its job's worker is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, FailedPrecondition, NotFound, Reason
from luthier.grading.asked import require_reward_model, reward_model_graders, reward_model_names
from luthier.storage.stored import require_uid
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.checkpoint_models import seen_as_model
from luthier.training.jobs.reinforcement import GRADER_FIELD, answer_tokens
from luthier.training.names import WEIGHTS, is_checkpoint
from luthier.training.reward_templates import template_warning
from luthier.training.weights import SeenModel, StoredModel, weight_files
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.families import Family, referred
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """A reward model, stored as one or a checkpoint seen as one.

    Attributes:
        model: it.
        whole: the model that has the weights below its adapter, or itself.
    """

    model: StoredModel | SeenModel
    whole: StoredModel | SeenModel

    @property
    def uids(self) -> tuple[str, str]:
        """Those of what must stay while it is used: a checkpoint holds no base model of its own."""
        return self.model.uid, self.whole.uid

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens that it can value; 0: it does not say."""
        return self.whole.message.context_length


def check_reward_models(job: FineTuningJob) -> None:
    """Raise InvalidArgument unless what a new job's grader names are models or checkpoints by their names."""
    for field, name in reward_model_names(job.reinforcement.grader, GRADER_FIELD):
        WEIGHTS.parse(name, field=field)


class RewardModels:
    """Finds the reward models of jobs."""

    def __init__(self, models: Models, jobs: Family[FineTuningJob, FineTuningJobPrivate]) -> None:
        self._models = models
        self._jobs = jobs

    async def find(
        self, connection: AsyncConnection, job: FineTuningJob, base: StoredModel
    ) -> tuple[RewardModel, ...]:
        """Return the reward models that a job's grader names, each once; `base` is the job's base model.

        Raises:
            NotFound: there is none of the name.
            InvalidArgument: REWARD_MODEL_EXPECTED, it is a model of another kind.
            FailedPrecondition: it is not READY (WRONG_STATE), or was taught with another tokenizer than the base's
                (TOKENIZER_MISMATCH).
        """
        found: dict[str, RewardModel] = {}
        for field, name in reward_model_names(job.reinforcement.grader, GRADER_FIELD):
            if name in found:
                continue
            model = await self._find(connection, name)
            require_reward_model(model.message, field)
            _require_tokenizer(model.message, base.message)
            whole = await self._base(connection, model.message) if model.message.base_model else model
            found[name] = RewardModel(model=model, whole=whole)
        return tuple(found.values())

    async def require(self, connection: AsyncConnection, found: Sequence[RewardModel]) -> None:
        """Raise Aborted unless all are still what they were: one may have been deleted, or a checkpoint dropped."""
        for one in found:
            name, uid = one.model.message.name, one.model.uid
            try:
                now = await self._find(connection, name)
            except NotFound:
                now = None
            if now is None or now.uid != uid:
                raise Aborted(f"{name} was deleted meanwhile; call again", metadata={"name": name})

    async def of_task(self, connection: AsyncConnection, job: FineTuningJob) -> list[task_pb2.GraderModel]:
        """Return what the worker of a job needs of its reward models."""
        told = []
        for name in dict.fromkeys(one.model for _, one in reward_model_graders(job.reinforcement.grader)):
            model = await self._of_uid(connection, name, referred(job, name).uid)
            one = task_pb2.GraderModel(model=name, files=weight_files(model), taught=model.message.taught)
            if model.message.base_model:
                base = await self._base(connection, model.message)
                one.base_model_files.extend(base.private.files)
                one.base_model_digest = base.message.digest
                one.base_precision = model.message.base_precision
            told.append(one)
        return told

    async def _find(self, connection: AsyncConnection, name: str) -> StoredModel | SeenModel:
        if is_checkpoint(name):
            return await seen_as_model(connection, self._models, self._jobs, name)
        return await self._models.find_ready(connection, name)

    async def _of_uid(self, connection: AsyncConnection, name: str, uid: str) -> StoredModel | SeenModel:
        if not is_checkpoint(name):
            return await self._models.base(connection, uid)
        seen = await seen_as_model(connection, self._models, self._jobs, name)
        require_uid(seen, uid)
        return seen

    async def _base(self, connection: AsyncConnection, model: Model) -> StoredModel:
        return await self._models.base(connection, referred(model, model.base_model).uid)


def require_room(job: FineTuningJob, rewards: Sequence[RewardModel], longest_prompt: int) -> None:
    """Raise FailedPrecondition SEQUENCE_TOO_LONG where a reward model cannot value the longest prompt and answer."""
    num_tokens = longest_prompt + answer_tokens(job)
    for one in rewards:
        if one.context_length and num_tokens > one.context_length:
            name = one.model.message.name
            raise FailedPrecondition(
                f"prompts and their answers must have at most the {one.context_length} tokens of the reward model "
                f"{name}, the longest prompt has {longest_prompt} and its answer may have {answer_tokens(job)}; set a "
                "smaller max_new_tokens, or create the rendering with a smaller max_tokens",
                reason=Reason.SEQUENCE_TOO_LONG,
                metadata={"name": name, "num_tokens": str(num_tokens)},
            )


def reward_warnings(rewards: Sequence[RewardModel], rendering: Rendering) -> Iterator[str]:
    """Yield what a user would want to know of reward models before prompts of a rendering are answered for them."""
    for one in rewards:
        warning = template_warning(one.model.message.name, one.model.message.taught, rendering)
        if warning:
            yield warning


def _require_tokenizer(model: Model, base: Model) -> None:
    found, wanted = model.taught.tokenizer_digest, base.tokenizer_digest
    if found == wanted:
        return
    raise FailedPrecondition(
        f"{model.name} must have been taught with the tokenizer of {base.name} (digest {wanted}), whose tokens it is "
        f"to value, it was taught with digest {found}; train a reward model on a rendering for this model",
        reason=Reason.TOKENIZER_MISMATCH,
        metadata={"name": model.name, "tokenizer_digest": found, "expected": wanted},
    )
