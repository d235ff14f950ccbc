"""Overview: is it healthy, what runs, what is stuck."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row
from deploy.grafana.expressions import SERVICE_ERRORS, gained, rate, ratio

_HEALTH = Row(
    title="Is it healthy?",
    panels=(
        Panel(
            title="Services that answer",
            kind="stat",
            width=4,
            height=4,
            queries=(Query(expr="count(luthier_build_info)"),),
            about="Three, with one of each.",
        ),
        Panel(
            title="Workers",
            kind="stat",
            width=4,
            height=4,
            queries=(Query(expr="sum(luthier_workers)"),),
        ),
        Panel(
            title="Failing calls",
            kind="stat",
            unit="percentunit",
            width=4,
            height=4,
            queries=(
                Query(
                    expr=ratio(
                        rate("grpc_server_handled_total", selector=SERVICE_ERRORS),
                        rate("grpc_server_handled_total"),
                    )
                ),
            ),
            about="For a fault of a service. Refusals and callers' mistakes are on the API's dashboard.",
        ),
        Panel(
            title="Work that failed here, a day",
            kind="stat",
            unit="percentunit",
            width=4,
            height=4,
            queries=(
                Query(
                    expr=ratio(
                        'sum(increase(luthier_tasks_ended_total{fault="service"}[1d]))',
                        "sum(increase(luthier_tasks_ended_total[1d]))",
                    )
                ),
            ),
            about="Share of the tasks that ended in a day whose failure was the service's fault.",
        ),
        Panel(
            title="Free disk",
            kind="stat",
            unit="bytes",
            width=4,
            height=4,
            queries=(Query(expr="min(luthier_disk_free_bytes)"),),
        ),
        Panel(
            title="Alerts that fire",
            kind="stat",
            width=4,
            height=4,
            queries=(Query(expr='count(ALERTS{alertstate="firing"}) or vector(0)'),),
        ),
    ),
)
_RUNNING = Row(
    title="What runs?",
    panels=(
        Panel(
            title="Tasks",
            stacked=True,
            queries=(Query(expr="sum by (kind, state) (luthier_tasks) > 0", legend="{{kind}} {{state}}"),),
        ),
        Panel(
            title="Tokens trained, a second",
            queries=(
                Query(
                    expr=rate("luthier_training_tokens_total", "fine_tuning_job"),
                    legend="{{fine_tuning_job}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            title="Answers",
            queries=(
                Query(expr="sum(luthier_generations_running)", legend="running"),
                Query(expr="sum(luthier_generations_waiting)", legend="waiting"),
            ),
        ),
    ),
)
_STUCK = Row(
    title="What is stuck?",
    panels=(
        Panel(
            title="Oldest that waits",
            unit="s",
            width=6,
            queries=(Query(expr="max by (kind) (luthier_task_oldest_waiting_seconds)", legend="{{kind}}"),),
            about="No line: nothing of that kind waits.",
        ),
        Panel(
            title="Why tasks wait",
            stacked=True,
            width=6,
            queries=(Query(expr="sum by (reason) (luthier_tasks_waiting)", legend="{{reason}}"),),
        ),
        Panel(
            title="Since the last step",
            unit="s",
            width=6,
            queries=(
                Query(
                    expr="time() - luthier_training_last_step_timestamp_seconds", legend="{{fine_tuning_job}}"
                ),
            ),
        ),
        Panel(
            title="Attempts that did not succeed",
            width=6,
            queries=(
                Query(
                    expr=gained(
                        "luthier_task_attempts_total", "kind, outcome, reason", 'outcome!="succeeded"'
                    ),
                    legend="{{kind}} {{outcome}} {{reason}}",
                ),
            ),
        ),
    ),
)
BOARD = Dashboard(uid="luthier-overview", title="Luthier / Overview", rows=(_HEALTH, _RUNNING, _STUCK))
