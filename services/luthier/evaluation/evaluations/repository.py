"""Evaluations and their predictions in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, delete, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.evaluations.domain import AnswerFile, Evaluation
from luthier.storage.resources import Resources, resource_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parents[1] / "migrations" / "versions"

evaluations = resource_table("evaluations", metadata)
predictions = Table(
    "predictions",
    metadata,
    Column("evaluation", String, primary_key=True),
    Column("row", BigInteger, primary_key=True, autoincrement=False),
    Column("prediction", LargeBinary, nullable=False),
)

answer_files = Table(
    "answer_files",
    metadata,
    Column("evaluation", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("path", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)


def evaluation_resources() -> Resources[Evaluation]:
    """Return the store of evaluations."""
    return Resources(evaluations, Evaluation)


class AnswerFiles:
    """Answers that workers kept while an evaluation runs, in the order of their checkpoints."""

    async def add(
        self, connection: AsyncConnection, evaluation: str, step: int, files: Sequence[AnswerFile]
    ) -> None:
        """Keep the files of a checkpoint; the same step again changes nothing."""
        if files:
            rows = [
                {"evaluation": evaluation, "step": step, "position": position, **asdict(file)}
                for position, file in enumerate(files)
            ]
            await connection.execute(insert(answer_files).on_conflict_do_nothing(), rows)

    async def read(self, connection: AsyncConnection, evaluation: str) -> list[AnswerFile]:
        """Return all files of an evaluation."""
        columns = answer_files.c
        statement = (
            select(columns.path, columns.sha256, columns.size_bytes)
            .where(columns.evaluation == evaluation)
            .order_by(columns.step, columns.position)
        )
        return [
            AnswerFile(path=row.path, sha256=row.sha256, size_bytes=row.size_bytes)
            for row in await connection.execute(statement)
        ]

    async def forget(self, connection: AsyncConnection, evaluation: str) -> None:
        """Drop the files of an evaluation that has ended."""
        await connection.execute(delete(answer_files).where(answer_files.c.evaluation == evaluation))


class Predictions:
    """What the arms of evaluations answered that ended before predictions were kept in files, as the wire shows it."""

    async def read(
        self, connection: AsyncConnection, evaluation: str, first_row: int, limit: int
    ) -> list[bytes]:
        """Return at most `limit` predictions from a row on."""
        statement = (
            select(predictions.c.prediction)
            .where(predictions.c.evaluation == evaluation, predictions.c.row >= first_row)
            .order_by(predictions.c.row)
            .limit(limit)
        )
        return list((await connection.execute(statement)).scalars())
