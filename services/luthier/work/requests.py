"""The request log: what each request_id was answered, kept in the transaction that did the work."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import delete, insert, select, tuple_

from luthier.storage.database import Database
from luthier.work.schema import request_log

FORGET_BATCH = 500


class SqlRequestLog:
    """Answers of mutating calls by (principal, method, request_id), for at least `keep_seconds`; 0: for ever."""

    def __init__(self, database: Database, keep_seconds: float) -> None:
        self._database = database
        self._keep_seconds = keep_seconds

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[None]:
        """Join everything the handler writes, and the answer itself, into one transaction."""
        async with self._database.unit_of_work():
            yield

    async def find(self, principal: str, method: str, request_id: str) -> tuple[str, bytes] | None:
        """Return the fingerprint and the answer of an earlier call, or None."""
        statement = select(request_log.c.fingerprint, request_log.c.response).where(
            request_log.c.principal == principal,
            request_log.c.method == method,
            request_log.c.request_id == request_id,
        )
        async with self._database.reading() as connection:
            row = (await connection.execute(statement)).first()
        return (row.fingerprint, row.response) if row is not None else None

    async def remember(
        self, principal: str, method: str, request_id: str, fingerprint: str, response: bytes
    ) -> None:
        """Store an answer in the current unit of work."""
        async with self._database.transaction() as connection:
            await connection.execute(
                insert(request_log).values(
                    principal=principal,
                    method=method,
                    request_id=request_id,
                    fingerprint=fingerprint,
                    response=response,
                    created_at_us=time.time_ns() // 1000,
                )
            )

    async def forget_old(self) -> None:
        """Delete answers older than the retention time, a batch a transaction: others write in between."""
        if self._keep_seconds == 0:
            return
        oldest_us = time.time_ns() // 1000 - round(self._keep_seconds * 1e6)
        key = request_log.primary_key.columns
        old = select(*key).where(request_log.c.created_at_us < oldest_us).limit(FORGET_BATCH)
        statement = delete(request_log).where(tuple_(*key).in_(old))
        while True:
            async with self._database.transaction() as connection:
                if (await connection.execute(statement)).rowcount < FORGET_BATCH:
                    return
