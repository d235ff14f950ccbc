"""What needs which blob of the Evaluation service."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.evaluations import repository
from luthier.evaluation.schema import answer_files, evaluations, shares
from luthier.storage.blob_refs import digests_in
from luthier.stored.v1.evaluation_pb2 import ShareRow
from luthier.work.blob_needs import Need, needs_of


async def needs(connection: AsyncConnection) -> AsyncIterator[Need]:
    """Yield all that evaluations need, those that go on with what their workers kept."""
    async for need in needs_of(connection, repository.evaluations()):
        yield need
    whole, live = evaluations.c, evaluations.c.delete_time_us.is_(None)
    kept = select(whole.uid, whole.name, answer_files.c.sha256).distinct().where(live)
    async for row in await connection.stream(kept.join(answer_files, answer_files.c.owner == whole.uid)):
        owner = repository.answers_owner(row.uid)
        yield Need(owner=owner, name=f"answers of {row.name}", digest=row.sha256)
    dealt = select(whole.uid, whole.name, shares.c.share).where(live)
    async for row in await connection.stream(dealt.join(shares, shares.c.owner == whole.uid)):
        for digest in digests_in(ShareRow.FromString(row.share)):
            owner = repository.shares_owner(row.uid)
            yield Need(owner=owner, name=f"a share of {row.name}", digest=digest)
