"""The alerts: of what breaks by itself, and of promises that are about to be broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from deploy.prometheus.recording import CALLERS, error_ratio, fault_ratio, slow_ratio
from deploy.prometheus.rules import Alert, Severity


def _later_than(timestamp: str, steps: int, seconds: int) -> str:
    """Return the expression of a job's time that is longer ago than so many of its steps, and so many seconds.

    A job that has not said how long its steps take, since it has made none yet say, has the seconds alone: compared
    with a series that is not there it would never be late.
    """
    age, step = f"time() - {timestamp}", "luthier_training_step_seconds"
    return f"{age} > clamp_min({steps} * {step}, {seconds}) or {age} > {seconds} unless {step}"


_JOBS = (
    Alert(
        alert="LuthierJobStalled",
        # Steps of large models take minutes: late is who takes twenty of its own steps, and a quarter of an hour.
        expr=_later_than("luthier_training_last_step_timestamp_seconds", 20, 900),
        lasting="5m",
        severity="critical",
        summary="A job has made no step for much longer than its steps take.",
        description="{{ $labels.fine_tuning_job }} has not moved for {{ $value | humanizeDuration }}.",
    ),
    Alert(
        alert="LuthierLossNotFinite",
        # The loop ends a job before a loss that is no number is shown anywhere: it shows in how jobs end.
        expr='sum by (kind) (increase(luthier_tasks_ended_total{reason="LOSS_NOT_FINITE"}[1h])) > 0',
        lasting="0m",
        severity="warning",
        summary="A job failed since its loss was no number.",
        description="{{ $value | humanize }} jobs of the last hour failed with LOSS_NOT_FINITE.",
    ),
    Alert(
        alert="LuthierCheckpointTooOld",
        # A checkpoint every 25 steps is the default, so that slow steps make old checkpoints: 200 of them are too many.
        expr=_later_than("luthier_training_checkpoint_timestamp_seconds", 200, 3600),
        lasting="5m",
        severity="warning",
        summary="A crash would lose much of what a job has trained.",
        description="The last checkpoint of {{ $labels.fine_tuning_job }} is {{ $value | humanizeDuration }} old.",
    ),
)
_QUEUE = (
    Alert(
        alert="LuthierQueueNotMoving",
        # Not how long something waits: behind long jobs that may be days. Somebody idle does not take it.
        expr='sum by (kind) (luthier_tasks_waiting{reason="TURN"}) > 0',
        lasting="5m",
        severity="critical",
        summary="Tasks wait although a worker that could do them has room.",
        description="{{ $value }} tasks of kind {{ $labels.kind }} wait while a worker has room for one.",
    ),
    Alert(
        alert="LuthierNoWorker",
        # Not that there is no worker: nobody may want one.
        expr='sum by (kind, reason) (luthier_tasks_waiting{reason=~"NO_WORKER|NO_FITTING_WORKER"}) > 0',
        lasting="5m",
        severity="critical",
        summary="Tasks wait that no worker can do.",
        description="{{ $value }} tasks of kind {{ $labels.kind }} wait: {{ $labels.reason }}.",
    ),
    Alert(
        alert="LuthierLeasesLost",
        # One worker that dies is taken over from, and nobody needs to get up.
        expr="sum by (service) (increase(luthier_lease_expired_total[30m])) >= 3",
        lasting="0m",
        severity="warning",
        summary="Workers fall silent again and again.",
        description="{{ $value | humanize }} leases of the {{ $labels.service }} service ran out in half an hour.",
    ),
    Alert(
        alert="LuthierChildrenCrash",
        expr='sum by (worker) (increase(luthier_worker_child_failures_total{reason=~"CRASHED|NURSERY"}[1h])) >= 3',
        lasting="0m",
        severity="warning",
        summary="The processes of a worker crash again and again.",
        description="{{ $value | humanize }} processes of {{ $labels.worker }} crashed in an hour.",
    ),
)
_SERVICES = (
    Alert(
        alert="LuthierServiceDown",
        # A restart takes seconds, and clients wait for it.
        expr='up{job="luthier"} == 0',
        lasting="2m",
        severity="critical",
        summary="A service does not answer.",
        description="The {{ $labels.service }} service at {{ $labels.instance }} gives no metrics.",
    ),
    Alert(
        alert="LuthierEventLoopBlocked",
        expr="histogram_quantile(0.99, sum by (service, le) (rate(luthier_event_loop_lag_seconds_bucket[5m]))) > 0.5",
        lasting="10m",
        severity="warning",
        summary="Something keeps a service from answering.",
        description="The event loop of the {{ $labels.service }} service is {{ $value | humanizeDuration }} late.",
    ),
)
_STORES = (
    Alert(
        alert="LuthierDiskBelowFloor",
        expr="luthier_disk_free_bytes < luthier_disk_floor_bytes",
        lasting="1m",
        severity="critical",
        summary="The disk has less room than its floor: nothing new begins.",
        description="{{ $value | humanize1024 }}B are free for the {{ $labels.service }} service.",
    ),
    Alert(
        alert="LuthierDiskFillsUp",
        # Not the pace alone: an upload into an empty disk is quick and harmless.
        expr="predict_linear(luthier_disk_free_bytes[6h], 86400) < luthier_disk_floor_bytes"
        " and luthier_disk_free_bytes < 20 * luthier_disk_floor_bytes",
        lasting="30m",
        severity="warning",
        summary="The disk reaches its floor within a day.",
        description="At its pace of six hours the disk of the {{ $labels.service }} service is full within a day.",
    ),
    Alert(
        alert="LuthierDatabaseSlow",
        # One slow commit in a quiet night is a high quantile, and nothing that anybody waits for.
        expr="histogram_quantile(0.95, sum by (service, le) (rate(luthier_database_commit_seconds_bucket[10m]))) > 0.5"
        " and on (service) sum by (service) (rate(luthier_database_commit_seconds_count[10m])) > 0.1",
        lasting="10m",
        severity="warning",
        summary="The database is slow to commit.",
        description="A commit of the {{ $labels.service }} service takes {{ $value | humanizeDuration }}.",
    ),
    Alert(
        alert="LuthierBlobStoreFailing",
        # A full disk has an alert of its own, and is not mended here.
        expr='sum by (service, operation) (increase(luthier_blob_failures_total{reason!="DISK_FULL"}[10m])) >= 3',
        lasting="0m",
        severity="critical",
        summary="The blob store fails.",
        description="{{ $value | humanize }} operations ({{ $labels.operation }}) of the {{ $labels.service }} service "
        "failed in ten minutes.",
    ),
)
_WEBHOOKS = (
    Alert(
        alert="LuthierWebhooksNotArriving",
        # Not that one of them does not: a receiver that is away for days is its owner's, and others are told meanwhile.
        expr="max by (service) (luthier_webhook_oldest_waiting_seconds) > 1800 and on (service)"
        ' sum by (service) (increase(luthier_webhook_attempts_total{result="confirmed"}[1h])) == 0',
        lasting="10m",
        severity="warning",
        summary="Webhooks are sent, and none of them arrives.",
        description="The {{ $labels.service }} service has had somebody to tell for {{ $value | humanizeDuration }}, "
        "and nobody confirmed anything in an hour.",
    ),
    Alert(
        alert="LuthierWebhooksNotSent",
        # Whatever receivers do is not in it, and a URL whose host was taken off the list is tried seldom.
        expr="sum by (service, result)"
        ' (increase(luthier_webhook_attempts_total{result=~"not_allowed|not_signed|failed"}[30m])) >= 5',
        lasting="0m",
        severity="warning",
        summary="Webhooks cannot be sent from here, whatever their receivers do.",
        description="{{ $value | humanize }} attempts of the {{ $labels.service }} service in half an hour ended as "
        "{{ $labels.result }}.",
    ),
)
_Burn = tuple[str, str, float, Severity]
"""A long and a short window, how many times too fast a budget burns, and how bad that is."""
_BURNS: Sequence[_Burn] = (
    ("1h", "5m", 14.4, "critical"),
    ("6h", "30m", 6.0, "critical"),
    ("1d", "2h", 3.0, "warning"),
    ("3d", "6h", 1.0, "warning"),
)


def _burns(
    alert: str, ratio: Callable[[str], str], budget: float, burns: Sequence[_Burn], enough: str, what: str
) -> list[Alert]:
    """Return alerts that fire while a budget burns so fast over a long window, and still does over a short one.

    `enough` is the expression of how much there was in a WINDOW, which must be more than a handful: one failure of
    three calls in a night is a share of a third.
    """
    return [
        Alert(
            alert=alert,
            expr=f"{ratio(long)} > {factor * budget:.6g} and {ratio(short)} > {factor * budget:.6g}"
            f" and {enough.replace('WINDOW', long)}",
            lasting="2m",
            severity=severity,
            summary=f"{what}: the budget of a month burns {factor:g} times as fast as it may.",
            description=f"{{{{ $value | humanizePercentage }}}} of the last {long}, and it goes on.",
            labels={"long": long, "short": short},
        )
        for long, short, factor, severity in burns
    ]


_CALLS_ENOUGH = f"sum by (grpc_service) (increase(grpc_server_handled_total{{{CALLERS}}}[WINDOW])) > 100"
_WORK_ENOUGH = "sum by (kind) (increase(luthier_tasks_ended_total[WINDOW])) > 10"
_PROMISES = (
    *_burns(
        "LuthierCallsFail",
        error_ratio,
        0.001,
        _BURNS,
        _CALLS_ENOUGH,
        "Calls fail for a fault of the service",
    ),
    *_burns(
        "LuthierCallsSlow",
        slow_ratio,
        0.01,
        _BURNS,
        _CALLS_ENOUGH,
        "Calls take longer than a second",
    ),
    *_burns(
        "LuthierWorkFails",
        fault_ratio,
        0.01,
        (("6h", "1h", 6.0, "critical"), ("3d", "6h", 1.0, "warning")),
        _WORK_ENOUGH,
        "Jobs and other work fail for a fault of the service",
    ),
)
GROUPS: Mapping[str, Sequence[Alert]] = {
    "luthier.alerts.jobs": _JOBS,
    "luthier.alerts.queue": _QUEUE,
    "luthier.alerts.services": _SERVICES,
    "luthier.alerts.stores": _STORES,
    "luthier.alerts.webhooks": _WEBHOOKS,
    "luthier.alerts.promises": _PROMISES,
}
ALERTS: tuple[Alert, ...] = tuple(alert for group in GROUPS.values() for alert in group)
