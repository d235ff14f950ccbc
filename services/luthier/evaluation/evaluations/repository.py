"""Evaluations and their predictions in SQL; an owner is an evaluation's uid."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.schema import answer_files, predictions
from luthier.evaluation.schema import evaluations as table
from luthier.storage.stored import Rows
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.families import WAITING
from luthier.worker.v1.task_pb2 import BlobFile

EvaluationRows = Rows[Evaluation, EvaluationPrivate]


def evaluations() -> EvaluationRows:
    """Return the stored evaluations."""
    return Rows(table, Evaluation, EvaluationPrivate, progress_fields=("progress", WAITING))


class AnswerFiles:
    """Answers that workers kept while an evaluation runs, in the order of their checkpoints."""

    async def add(
        self, connection: AsyncConnection, owner: str, step: int, files: Sequence[BlobFile]
    ) -> None:
        """Keep the files of a checkpoint; the same step again changes nothing."""
        rows = [
            {
                "owner": owner,
                "step": step,
                "position": position,
                "path": file.path,
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
            }
            for position, file in enumerate(files)
        ]
        if rows:
            await connection.execute(insert(answer_files).on_conflict_do_nothing(), rows)

    async def read(self, connection: AsyncConnection, owner: str) -> list[BlobFile]:
        """Return all files of an evaluation."""
        columns = answer_files.c
        statement = (
            select(columns.path, columns.sha256, columns.size_bytes)
            .where(columns.owner == owner)
            .order_by(columns.step, columns.position)
        )
        return [BlobFile(**row) for row in (await connection.execute(statement)).mappings()]

    async def forget(self, connection: AsyncConnection, owner: str) -> None:
        """Drop the files of an evaluation that has ended."""
        await connection.execute(delete(answer_files).where(answer_files.c.owner == owner))


class Predictions:
    """What the arms of evaluations answered that ended before predictions were kept in files."""

    async def read(self, connection: AsyncConnection, owner: str, first_row: int, limit: int) -> list[bytes]:
        """Return at most `limit` predictions from a row on, each as a serialized Prediction."""
        statement = (
            select(predictions.c.prediction)
            .where(predictions.c.owner == owner, predictions.c.row >= first_row)
            .order_by(predictions.c.row)
            .limit(limit)
        )
        return list((await connection.execute(statement)).scalars())
