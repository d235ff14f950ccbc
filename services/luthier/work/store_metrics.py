"""Prometheus metrics of a database and of the disk that it is on."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from luthier.runtime.catalogue import stores
from luthier.storage.disk import Disk


class DatabaseMetrics:
    """Times what a database does: an observer of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queried = stores.QUERY_SECONDS.histogram(registry).observe
        self.committed = stores.COMMIT_SECONDS.histogram(registry).observe
        self.waited = stores.WRITER_WAIT.histogram(registry).observe


def show_disk(registry: CollectorRegistry, disk: Disk) -> None:
    """Show what is free on a disk whenever somebody looks."""
    stores.FREE.gauge(registry).set_function(disk.free_bytes)
    stores.FLOOR.gauge(registry).set(disk.min_free_bytes)
