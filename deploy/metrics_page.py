"""`docs/metrics.md`: the catalogue of metrics as a page."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.runtime.catalogue import FAMILIES, metrics_of
from luthier.runtime.metric import SERVICES, Metric

_HEAD = """\
# Metrics

Written by `make metrics` from `luthier.runtime.catalogue`; a test compares it.

Each service serves these on `/metrics` at an address of its own ([operations](operations.md)); workers serve none, the
services export what workers tell them. A page is formed by a thread of its own, so that calls go on meanwhile.
Dashboards, rules and what is to be done about each alert: [monitoring](monitoring.md).

Labels have few values. A label that somebody else chooses (a reason that a worker brings, a project, a worker, a job)
has a limit, which the last column says; what is beyond it is counted together as `OTHER`, or has no series. Series of a
job are there from its first step until its attempt ends: at most 20 a job. They are named `fine_tuning_job`, as `job`
is a label of Prometheus's own.

`grpc_server_*` have go-grpc-middleware's names and labels, so that dashboards and rules for those fit. One thing
differs: `grpc_server_handling_seconds` has unary calls alone. Streams last as long as somebody watches, which is no
latency: `luthier_grpc_stream_seconds` has them. Of unary calls `ClaimTask` waits for work for up to 30 s, as it is
meant to: leave `luthier.worker.v1.WorkerService` out of what is said of latency, as the rules do.
"""


def page() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_tables()])


def _tables() -> Iterator[str]:
    for title, family in FAMILIES.items():
        yield f"## {title}\n"
        yield "| metric | type | labels | unit | answers | is | series |"
        yield "|---|---|---|---|---|---|---|"
        for metric in metrics_of(family):
            yield _row(metric)
        yield ""


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    where = "" if metric.services == SERVICES else f" ({' and '.join(metric.services)})"
    cells = (
        f"`{metric.name}`",
        metric.kind,
        labels,
        metric.unit,
        metric.question,
        metric.help,
        metric.bound + where,
    )
    return f"| {' | '.join(cells)} |"
