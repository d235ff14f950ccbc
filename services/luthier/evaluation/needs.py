"""What needs which blob of the Evaluation service, and holds what it is made from."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.evaluation.evaluations import repository
from luthier.evaluation.schema import answer_files, evaluations, shares
from luthier.storage.blob_refs import digests_in
from luthier.storage.deleted import is_kept
from luthier.stored.v1.evaluation_pb2 import ShareRow
from luthier.work.blob_needs import Need, needs_of
from luthier.work.hold_check import Holder, made_from

HOLDERS = (Holder(rows=repository.evaluations(), needed=made_from),)
"""Whose resources hold others."""


async def needs(connection: AsyncConnection) -> AsyncIterator[Need]:
    """Yield all that evaluations need, deleted ones too, and those that go on with what their workers kept."""
    async for need in needs_of(connection, repository.evaluations()):
        yield need
    whole, certain = evaluations.c, is_kept(evaluations).label("is_certain")
    kept = select(whole.uid, whole.name, answer_files.c.sha256, certain).distinct()
    async for row in await connection.stream(kept.join(answer_files, answer_files.c.owner == whole.uid)):
        owner = repository.answers_owner(row.uid)
        name = f"answers of {row.name}"
        yield Need(owner=owner, name=name, digest=row.sha256, is_certain=row.is_certain)
    dealt = select(whole.uid, whole.name, shares.c.share, certain)
    async for row in await connection.stream(dealt.join(shares, shares.c.owner == whole.uid)):
        for digest in digests_in(ShareRow.FromString(row.share)):
            owner, name = repository.shares_owner(row.uid), f"a share of {row.name}"
            yield Need(owner=owner, name=name, digest=digest, is_certain=row.is_certain)
