"""Queue and workers: what waits and why, who is there, what becomes of attempts, how data is prepared."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row
from deploy.grafana.expressions import WINDOW, gained, quantile, rate

_QUEUE = Row(
    title="Queue",
    panels=(
        Panel(
            title="Waiting and worked on",
            stacked=True,
            queries=(Query(expr="sum by (kind, state) (luthier_tasks)", legend="{{kind}} {{state}}"),),
        ),
        Panel(
            title="Oldest that waits, by project",
            unit="s",
            queries=(
                Query(
                    expr="max by (kind, project) (luthier_task_oldest_waiting_seconds)",
                    legend="{{kind}} {{project}}",
                ),
            ),
        ),
        Panel(
            title="Why",
            stacked=True,
            queries=(
                Query(expr="sum by (kind, reason) (luthier_tasks_waiting) > 0", legend="{{kind}} {{reason}}"),
            ),
            about="BUSY: more workers would help. NO_WORKER, NO_FITTING_WORKER: only the right worker will.",
        ),
        Panel(
            title="Wait until a claim",
            unit="s",
            queries=(
                Query(
                    expr=quantile(0.5, "luthier_task_queue_wait_seconds", "kind"), legend="{{kind}} median"
                ),
                Query(expr=quantile(0.95, "luthier_task_queue_wait_seconds", "kind"), legend="{{kind}} 95 %"),
            ),
        ),
        Panel(
            title="Attempts that ended",
            queries=(
                Query(
                    expr=gained("luthier_task_attempts_total", "outcome, reason"),
                    legend="{{outcome}} {{reason}}",
                ),
            ),
        ),
        Panel(
            title="Leases that ran out, tasks set aside",
            queries=(
                Query(expr=f"sum(increase(luthier_lease_expired_total[{WINDOW}]))", legend="leases"),
                Query(expr=f"sum(increase(luthier_task_set_aside_total[{WINDOW}]))", legend="set aside"),
            ),
        ),
    ),
)
_WORKERS = Row(
    title="Workers",
    panels=(
        Panel(
            title="Able and idle",
            queries=(
                Query(expr="sum by (kind) (luthier_workers_able)", legend="{{kind}} able"),
                Query(expr="sum by (kind) (luthier_workers_idle)", legend="{{kind}} idle"),
            ),
        ),
        Panel(
            title="Who is there",
            kind="table",
            queries=(
                Query(expr="luthier_worker_info"),
                Query(expr="luthier_worker_memory_bytes"),
                Query(expr="luthier_worker_devices"),
            ),
            width=16,
        ),
        Panel(
            title="Tasks held",
            queries=(Query(expr="luthier_worker_tasks", legend="{{worker}}"),),
            stacked=True,
        ),
        Panel(
            title="Memory held by worker and children",
            unit="bytes",
            queries=(
                Query(expr="luthier_worker_resident_bytes", legend="{{worker}}"),
                Query(expr="min(luthier_worker_available_bytes)", legend="available on a machine"),
            ),
        ),
        Panel(
            title="Children",
            queries=(
                Query(expr="luthier_worker_children", legend="{{worker}} at work"),
                Query(
                    expr=rate("luthier_worker_child_starts_total", "worker"),
                    legend="{{worker}} begun a second",
                ),
            ),
        ),
        Panel(
            title="Children that failed",
            queries=(
                Query(
                    expr=f"sum by (worker, reason) (increase(luthier_worker_child_failures_total[{WINDOW}]))",
                    legend="{{worker}} {{reason}}",
                ),
            ),
        ),
    ),
)
_DATA = Row(
    title="Data",
    panels=(
        Panel(
            title="Records a second",
            queries=(Query(expr=rate("luthier_data_rows_total", "stage"), legend="{{stage}}"),),
        ),
        Panel(
            title="Bytes of files a second",
            unit="Bps",
            queries=(Query(expr=rate("luthier_data_source_bytes_total"), legend="read"),),
        ),
        Panel(
            title="Bad records",
            queries=(
                Query(
                    expr=gained("luthier_data_bad_records_total", "stage, reason"),
                    legend="{{stage}} {{reason}}",
                ),
            ),
        ),
    ),
)
BOARD = Dashboard(
    uid="luthier-queue-and-workers", title="Luthier / Queue and workers", rows=(_QUEUE, _WORKERS, _DATA)
)
