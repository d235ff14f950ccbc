"""Evaluations and their predictions in SQL."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.evaluations.domain import Evaluation
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


def evaluation_resources() -> Resources[Evaluation]:
    """Return the store of evaluations."""
    return Resources(evaluations, Evaluation)


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
