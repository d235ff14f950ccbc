"""Aliases and their moves in SQL; an owner is an alias's uid."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.schema import alias_moves, model_aliases
from luthier.storage.stored import Rows
from luthier.stored.v1.evaluation_pb2 import ModelAliasPrivate
from luthier.v1.model_alias_pb2 import AliasMove, ModelAlias

AliasRows = Rows[ModelAlias, ModelAliasPrivate]


def aliases() -> AliasRows:
    """Return the stored aliases."""
    return Rows(model_aliases, ModelAlias, ModelAliasPrivate)


class Moves:
    """What aliases stood for, move by move."""

    async def add(self, connection: AsyncConnection, owner: str, move: AliasMove) -> None:
        """Write down the next move of an alias."""
        row = {"owner": owner, "number": move.number, "move": move.SerializeToString(deterministic=True)}
        await connection.execute(insert(alias_moves).values(row))

    async def read(
        self, connection: AsyncConnection, owner: str, after: int, limit: int
    ) -> Sequence[AliasMove]:
        """Return at most `limit` moves of an alias after a number, in order."""
        statement = (
            select(alias_moves.c.move)
            .where(alias_moves.c.owner == owner, alias_moves.c.number > after)
            .order_by(alias_moves.c.number)
            .limit(limit)
        )
        return [AliasMove.FromString(row) for row in (await connection.execute(statement)).scalars()]

    async def forget(self, connection: AsyncConnection, owner: str) -> None:
        """Drop the moves of an alias that is deleted."""
        await connection.execute(delete(alias_moves).where(alias_moves.c.owner == owner))
