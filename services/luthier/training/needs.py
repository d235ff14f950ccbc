"""What needs which blob of the Training service, and holds what it is made from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.blob_refs import digests_in
from luthier.storage.deleted import is_kept
from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import CheckpointPrivate
from luthier.training.jobs import repository as jobs
from luthier.training.models import repository as models
from luthier.training.schema import checkpoints, fine_tuning_jobs, rollouts
from luthier.v1.reference_pb2 import Reference
from luthier.work.blob_needs import Need, needs_of
from luthier.work.hold_check import Holder, made_from


def _source(model: Stored[Any, Any]) -> Iterable[Reference]:
    """Return the base model of one that is merged or written for other programs; others come from no resource.

    A model's references go back to the data that it learnt from, which it does not hold.
    """
    return [Reference(uid=model.private.source_uid)] if model.private.source_uid else ()


HOLDERS = (Holder(rows=models.models(), needed=_source), Holder(rows=jobs.jobs(), needed=made_from))
"""Whose resources hold others."""


async def needs(connection: AsyncConnection) -> AsyncIterator[Need]:
    """Yield all that models, jobs, their checkpoints and their rollouts need, deleted ones too."""
    async for need in needs_of(connection, models.models(), jobs.jobs()):
        yield need
    job, certain = fine_tuning_jobs.c, is_kept(fine_tuning_jobs).label("is_certain")
    kept = select(job.name, checkpoints.c.job, checkpoints.c.step, checkpoints.c.private, certain)
    async for row in await connection.stream(kept.join(checkpoints, checkpoints.c.job == job.uid)):
        owner, name = jobs.checkpoint_owner(row.job, row.step), f"{row.name}/checkpoints/step-{row.step}"
        for digest in dict.fromkeys(digests_in(CheckpointPrivate.FromString(row.private))):
            yield Need(owner=owner, name=name, digest=digest, is_certain=row.is_certain)
    drawn = select(job.name, rollouts.c.job, rollouts.c.step, rollouts.c.digest, certain)
    async for row in await connection.stream(drawn.join(rollouts, rollouts.c.job == job.uid)):
        owner, name = jobs.rollouts_owner(row.job, row.step), f"rollouts of step {row.step} of {row.name}"
        yield Need(owner=owner, name=name, digest=row.digest, is_certain=row.is_certain)
