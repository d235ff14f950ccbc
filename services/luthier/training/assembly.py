"""The families of the Training service put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.training import schema
from luthier.training.jobs import repository as job_rows
from luthier.training.jobs.checkpoint_models import CheckpointModels
from luthier.training.jobs.handler import TrainHandler
from luthier.training.jobs.service import JobService, Outside, Renderings
from luthier.training.jobs.servicer import TrainingServicer
from luthier.training.models import repository as model_rows
from luthier.training.models.making import ModelMaking
from luthier.training.models.service import ModelService
from luthier.training.models.servicer import ModelServicer, RegisterModelHandler
from luthier.training.models.tasks import KINDS as MAKING_KINDS
from luthier.training.models.tasks import MakingHandler
from luthier.work.elsewhere import Elsewhere
from luthier.work.handlers import TaskHandler
from luthier.work.hold_servicer import Holdable
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.pausing import PausableTasks
from luthier.work.purging import Purged
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.waiting import Present
from luthier.work.webhooks.targets import Targets

PURGED = (
    Purged(rows=model_rows.models()),
    Purged(rows=job_rows.jobs(), parts=[table.c.job for table in schema.OF_JOBS]),
)
"""What is purged, what holds others before those."""


class Parts(Protocol):
    """What the process gives its service."""

    @property
    def database(self) -> Database:
        """The service's database."""

    @property
    def blobs(self) -> BlobStore:
        """The service's blobs."""

    @property
    def log(self) -> EventLog:
        """Events of its resources."""

    @property
    def queue(self) -> PausableTasks:
        """Work for its workers."""

    @property
    def workers(self) -> Present:
        """Which of them are heard of."""

    @property
    def elsewhere(self) -> Elsewhere:
        """What its resources need at other services."""

    @property
    def keeping(self) -> Keeping:
        """How long it keeps what is over."""

    @property
    def page_tokens(self) -> PageTokens:
        """Makes tokens of list calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The two servicers, who follows each kind of task, and what others may hold."""

    jobs: TrainingServicer
    models: ModelServicer
    handlers: Mapping[TaskKind, TaskHandler]
    families: Mapping[str, Holdable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What the operator allows.

    Attributes:
        rewards: which reward services graders may ask.
        webhooks: where jobs may tell that they have ended.
    """

    rewards: RewardAddresses
    webhooks: Targets


def assemble(parts: Parts, renderings: Renderings, allowed: Allowed) -> Training:
    """Put the service together on real adapters or a test's."""
    models = ModelService(parts.database, parts.log, parts.queue, parts.blobs, parts.keeping)
    outside = Outside(
        renderings=renderings,
        elsewhere=parts.elsewhere,
        rewards=allowed.rewards,
        webhooks=allowed.webhooks,
        workers=parts.workers,
    )
    jobs = JobService(parts.database, parts.log, parts.queue, models, outside, parts.blobs, parts.keeping)
    checkpoints = CheckpointModels(parts.database, models, jobs.family)
    making = ModelMaking(parts.database, models, checkpoints)
    handlers: Mapping[TaskKind, TaskHandler] = {
        TaskKind.REGISTER_MODEL: RegisterModelHandler(models),
        **dict.fromkeys(MAKING_KINDS, MakingHandler(models, making)),
        TaskKind.TRAIN: TrainHandler(jobs.family, parts.log, models, parts.blobs, jobs.rollouts),
    }
    return Training(
        jobs=TrainingServicer(jobs, parts.page_tokens),
        models=ModelServicer(models, making, checkpoints, parts.page_tokens),
        handlers=handlers,
        families={"models": model_rows.models(), "checkpoints": checkpoints},
    )
