"""Prometheus metrics of a database and of the disk that it is on, and the database's part in traces."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry

from luthier.runtime import tracing
from luthier.runtime.catalogue import stores
from luthier.storage import dialect
from luthier.storage.disk import Disk

_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE)\s+(\w+)")
_MAX_STATEMENT = 500
_SYSTEM = {"db.system.name": dialect.SYSTEM}
_COMMIT: tracing.Attributes = {**_SYSTEM, "db.query.text": "COMMIT"}


class DatabaseMetrics:
    """Times what a database does: an observer of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._query_seconds = stores.QUERY_SECONDS.histogram(registry)
        self._commit_seconds = stores.COMMIT_SECONDS.histogram(registry)
        self._writer_wait = stores.WRITER_WAIT.histogram(registry)

    def queried(self, seconds: float, statement: str) -> None:
        """Time a statement, and keep it with the call that made it."""
        self._query_seconds.observe(seconds)
        if tracing.is_on():
            tracing.past(_named(statement), seconds, _described(statement))

    def committed(self, seconds: float) -> None:
        """Time a commit."""
        self._commit_seconds.observe(seconds)
        tracing.past("COMMIT", seconds, _COMMIT)

    def waited(self, seconds: float) -> None:
        """Time a wait for other writers."""
        self._writer_wait.observe(seconds)
        tracing.past("wait for other writers", seconds)


def _named(statement: str) -> str:
    """Return what a statement does to which table."""
    word = statement.split(maxsplit=1)[0] if statement else ""
    table = _TABLE.search(statement)
    return f"{word} {table[1]}" if table else word


def _described(statement: str) -> tracing.Attributes:
    return {**_SYSTEM, "db.query.text": statement[:_MAX_STATEMENT]}


def show_disk(registry: CollectorRegistry, disk: Disk) -> None:
    """Show what is free on a disk whenever somebody looks."""
    stores.FREE.gauge(registry).set_function(disk.free_bytes)
    stores.FLOOR.gauge(registry).set(disk.min_free_bytes)
