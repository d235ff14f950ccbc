"""Checkpoints seen as the models that they would be, and what else models ask of jobs."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.storage.database import Database
from luthier.storage.pages import parent_of
from luthier.storage.stored import require_uid
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.jobs import repository
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.tuned import origin_of, tuned_model
from luthier.training.weights import SeenModel
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, HeldOutScores
from luthier.v1.model_pb2 import Model
from luthier.work.families import Family, referred


class CheckpointModels:
    """The checkpoints of all jobs, each as a model of its name, uid and weights."""

    def __init__(
        self, database: Database, models: Models, jobs: Family[FineTuningJob, FineTuningJobPrivate]
    ) -> None:
        self._database = database
        self._models = models
        self._jobs = jobs

    async def read(self, name: str, uid: str = "") -> SeenModel:
        """Return a checkpoint as a model, the one of a uid if that is given. Raises NotFound."""
        async with self._database.reading() as connection:
            seen = await self._get(connection, name)
        require_uid(seen, uid)
        return seen

    async def find(self, connection: AsyncConnection, name: str) -> SeenModel | None:
        """Return a checkpoint as a model, as a transaction sees it; None when there is none of this name."""
        try:
            return await self._get(connection, name)
        except NotFound:
            return None

    async def trains(self, connection: AsyncConnection, name: str) -> str:
        """Return the name of the job that will make a model of a name; empty: none that has not ended."""
        return await repository.job_that_trains(connection, name)

    async def held_out(self, connection: AsyncConnection, model: Model) -> HeldOutScores | None:
        """Return what a model's job found of held-out tokens; None: nothing, at another step, or it is gone."""
        try:
            job = await self._jobs.of_uid(connection, referred(model, model.fine_tuning_job).uid)
        except NotFound:
            return None
        record = job.message.run_record
        return record.held_out if record.HasField("held_out") and record.held_out.step == model.step else None

    async def _get(self, connection: AsyncConnection, name: str) -> SeenModel:
        return await seen_as_model(connection, self._models, self._jobs, name)


async def seen_as_model(
    connection: AsyncConnection,
    models: Models,
    jobs: Family[FineTuningJob, FineTuningJobPrivate],
    name: str,
) -> SeenModel:
    """Return a checkpoint as the model that it would be, READY. Raises NotFound."""
    checkpoint = await repository.Checkpoints().get(connection, name)
    job = await jobs.get(connection, parent_of(name))
    wanted = tuned_model(job, checkpoint.message.step)
    wanted.name, wanted.uid = name, checkpoint.message.uid
    wanted.create_time.CopyFrom(checkpoint.message.create_time)
    wanted.update_time.CopyFrom(checkpoint.message.create_time)
    return await models.tuned(connection, wanted, origin_of(job), checkpoint.private.files)
