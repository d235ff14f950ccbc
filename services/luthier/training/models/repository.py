"""Models in SQL."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from luthier.storage.database import Database
from luthier.storage.stored import Rows
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training import schema
from luthier.v1.model_pb2 import Model
from luthier.work.families import WAITING, told_of


def models() -> Rows[Model, ModelPrivate]:
    """Return the stored models."""
    return Rows(
        schema.models,
        Model,
        ModelPrivate,
        columns={
            "kind": lambda model, _: Model.Kind.Name(model.kind).removeprefix("KIND_"),
            "base_model": lambda model, _: model.base_model,
            "fine_tuning_job": lambda model, _: model.fine_tuning_job,
            "base_model_uid": lambda model, _: told_of(model, model.base_model),
            "fine_tuning_job_uid": lambda model, _: told_of(model, model.fine_tuning_job),
        },
        progress_fields=(WAITING,),
    )


async def live_job(database: Database, name: str) -> Sequence[str]:
    """Return the uid of the job that has a name now, as filters take it; empty when none has."""
    jobs = schema.fine_tuning_jobs.c
    rows = await database.rows(select(jobs.uid).where(jobs.name == name, jobs.delete_time_us.is_(None)))
    return [row["uid"] for row in rows]
