"""Stores: are the databases, the blobs and the disk quick and whole, and how full are they."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row
from deploy.grafana.expressions import gained, quantile, rate


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(expr=quantile(share, histogram, "instance"), legend=f"{{{{instance}}}} {share:.0%}")
        for share in (0.5, 0.99)
    )


_DATABASE = Row(
    title="Database",
    panels=(
        Panel(title="A statement", unit="s", width=6, queries=_quantiles("luthier_database_query_seconds")),
        Panel(
            title="A commit",
            unit="s",
            width=6,
            queries=_quantiles("luthier_database_commit_seconds"),
            about="It waits for the disk: a slow one shows here first.",
        ),
        Panel(
            title="Waiting to write",
            unit="s",
            width=6,
            queries=_quantiles("luthier_database_writer_wait_seconds"),
            about="Writers stand in line: one at a time writes.",
        ),
        Panel(
            title="Statements and commits a second",
            unit="ops",
            width=6,
            queries=(
                Query(
                    expr=rate("luthier_database_query_seconds_count", "instance"),
                    legend="{{instance}} statements",
                ),
                Query(
                    expr=rate("luthier_database_commit_seconds_count", "instance"),
                    legend="{{instance}} commits",
                ),
            ),
        ),
    ),
)
_BLOBS = Row(
    title="Blobs",
    panels=(
        Panel(
            title="Operations a second",
            unit="ops",
            width=6,
            queries=(
                Query(expr=rate("luthier_blob_operation_seconds_count", "operation"), legend="{{operation}}"),
            ),
        ),
        Panel(
            title="Time of operations (99 %)",
            unit="s",
            width=6,
            queries=(
                Query(
                    expr=quantile(0.99, "luthier_blob_operation_seconds", "operation"), legend="{{operation}}"
                ),
            ),
        ),
        Panel(
            title="Bytes a second",
            unit="Bps",
            width=6,
            queries=(Query(expr=rate("luthier_blob_bytes_total", "operation"), legend="{{operation}}"),),
        ),
        Panel(
            title="Failures",
            width=6,
            queries=(
                Query(
                    expr=gained("luthier_blob_failures_total", "operation, reason"),
                    legend="{{operation}} {{reason}}",
                ),
            ),
        ),
    ),
)
_DISK = Row(
    title="Disk",
    panels=(
        Panel(
            title="Stored blobs",
            unit="bytes",
            width=12,
            queries=(Query(expr="luthier_blob_stored_bytes", legend="{{instance}} {{state}}"),),
            about="Loose ones go by themselves once the grace period is over.",
        ),
        Panel(
            title="Bytes that came back",
            unit="bytes",
            width=12,
            queries=(
                Query(expr=gained("luthier_blob_collected_bytes_total", "instance"), legend="{{instance}}"),
            ),
        ),
        Panel(
            title="Resources purged",
            width=12,
            queries=(
                Query(
                    expr=gained("luthier_purged_resources_total", "instance, table"),
                    legend="{{instance}} {{table}}",
                ),
            ),
            about="30 days after their deletion, or when somebody does not want to wait.",
        ),
        Panel(
            title="Free, and the floor",
            unit="bytes",
            width=12,
            queries=(
                Query(expr="luthier_disk_free_bytes", legend="{{instance}} free"),
                Query(expr="luthier_disk_floor_bytes", legend="{{instance}} floor"),
            ),
            about="Below the floor nothing new begins; below a 16th of it no blob is stored.",
        ),
        Panel(
            title="Free in a day, at the pace of the last hour",
            unit="bytes",
            width=12,
            queries=(
                Query(expr="predict_linear(luthier_disk_free_bytes[1h], 86400)", legend="{{instance}}"),
            ),
        ),
    ),
)
BOARD = Dashboard(uid="luthier-stores", title="Luthier / Stores", rows=(_DATABASE, _BLOBS, _DISK))
