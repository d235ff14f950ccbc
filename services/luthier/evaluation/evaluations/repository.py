"""Evaluations and their predictions in SQL; an owner is an evaluation's uid."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.schema import answer_files, predictions, shares
from luthier.evaluation.schema import evaluations as table
from luthier.storage import blob_refs
from luthier.storage.blob_refs import digests_in
from luthier.storage.dialect import insert
from luthier.storage.stored import Rows
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, ShareRow
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.families import WAITING
from luthier.worker.v1.task_pb2 import BlobFile

EvaluationRows = Rows[Evaluation, EvaluationPrivate]


def evaluations() -> EvaluationRows:
    """Return the stored evaluations."""
    return Rows(table, Evaluation, EvaluationPrivate, progress_fields=("progress", WAITING))


class AnswerFiles:
    """Answers that workers kept while an evaluation runs, in the order of their checkpoints; share 0 is the whole."""

    async def add(
        self, connection: AsyncConnection, owner: str, share: int, step: int, files: Sequence[BlobFile]
    ) -> None:
        """Keep the files of a checkpoint; the same step again changes nothing."""
        rows = [
            {
                "owner": owner,
                "share": share,
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
            columns = answer_files.c
            kept = select(columns.sha256).where(
                columns.owner == owner, columns.share == share, columns.step == step
            )
            await blob_refs.refer(
                connection, answers_owner(owner), (await connection.execute(kept)).scalars()
            )

    async def read(self, connection: AsyncConnection, owner: str, share: int | None = None) -> list[BlobFile]:
        """Return the files of a share of an evaluation, None: of all that it has."""
        columns = answer_files.c
        statement = (
            select(columns.path, columns.sha256, columns.size_bytes)
            .where(columns.owner == owner)
            .order_by(columns.share, columns.step, columns.position)
        )
        if share is not None:
            statement = statement.where(columns.share == share)
        return [BlobFile(**row) for row in (await connection.execute(statement)).mappings()]

    async def forget(self, connection: AsyncConnection, owner: str) -> None:
        """Drop the files of an evaluation that has ended."""
        await connection.execute(delete(answer_files).where(answer_files.c.owner == owner))
        await blob_refs.drop(connection, answers_owner(owner))


class Shares:
    """How the shares of evaluations stand, until the evaluation has ended."""

    async def put(self, connection: AsyncConnection, owner: str, row: ShareRow) -> None:
        """Store how a share stands now."""
        values = {
            "owner": owner,
            "number": row.share.number,
            "share": row.SerializeToString(deterministic=True),
        }
        statement = insert(shares).values(values)
        replaced = statement.on_conflict_do_update(
            index_elements=["owner", "number"], set_={"share": values["share"]}
        )
        await connection.execute(replaced)
        await blob_refs.refer(connection, shares_owner(owner), digests_in(row))

    async def read(self, connection: AsyncConnection, owner: str) -> list[ShareRow]:
        """Return the shares of an evaluation by number; none: it was not dealt, or has ended."""
        statement = select(shares.c.share).where(shares.c.owner == owner).order_by(shares.c.number)
        return [ShareRow.FromString(one) for one in (await connection.execute(statement)).scalars()]

    async def forget(self, connection: AsyncConnection, owner: str) -> None:
        """Drop the shares of an evaluation that has ended."""
        await connection.execute(delete(shares).where(shares.c.owner == owner))
        await blob_refs.drop(connection, shares_owner(owner))


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


def answers_owner(uid: str) -> str:
    """Return what refers to the answers that workers kept of an evaluation."""
    return f"{uid}/answers"


def shares_owner(uid: str) -> str:
    """Return what refers to the predictions of an evaluation's shares."""
    return f"{uid}/shares"
