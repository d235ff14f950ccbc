"""Each alert fires when it should, and stays quiet where a simpler rule would not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from deploy.prometheus import recording
from deploy.prometheus.alerts import ALERTS
from deploy.prometheus.rules import group_text
from tests.deploy.conftest import Promtool

LAST = "luthier_training_last_step_timestamp_seconds{fine_tuning_job='j'}"
LAST_OF_OTHER = "luthier_training_last_step_timestamp_seconds{fine_tuning_job='other'}"
STEP = "luthier_training_step_seconds{fine_tuning_job='j'}"
CHECKPOINT = "luthier_training_checkpoint_timestamp_seconds{fine_tuning_job='j'}"
CALLS = "grpc_server_handled_total{grpc_service='luthier.v1.DataService', grpc_code='%s'}"
WORKERS_CALLS = "grpc_server_handled_total{grpc_service='luthier.worker.v1.WorkerService', grpc_code='%s'}"
TIMES = "grpc_server_handling_seconds_%s{grpc_service='luthier.v1.DataService', grpc_type='unary'%s}"
CLAIMS = (
    "grpc_server_handling_seconds_%s{grpc_service='luthier.worker.v1.WorkerService', grpc_type='unary'%s}"
)
ENDED = "luthier_tasks_ended_total{kind='TRAIN', outcome='%s', fault='%s', reason='%s'}"
WAITING = "luthier_tasks_waiting{kind='TRAIN', reason='%s'}"
LAG = "luthier_event_loop_lag_seconds_bucket{service='data', le='%s'}"
COMMITS = "luthier_database_commit_seconds_%s{service='data'%s}"
BLOBS = "luthier_blob_failures_total{service='data', operation='write', reason='%s'}"
CHILDREN = "luthier_worker_child_failures_total{worker='w', reason='%s'}"
ATTEMPTS = "luthier_webhook_attempts_total{service='training', result='%s'}"
UNTOLD = "luthier_webhook_oldest_waiting_seconds{service='training'}"
FREE, FLOOR = "luthier_disk_free_bytes{service='data'}", "luthier_disk_floor_bytes{service='data'}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is scraped once a minute, in Prometheus's notation, and how an alert stands after some minutes."""

    alert: str
    why: str
    series: dict[str, str]
    minutes: int
    fires: bool

    def __str__(self) -> str:
        return f"{self.alert}-{'fires' if self.fires else 'quiet'}-{self.why}"


def fires(alert: str, why: str, series: dict[str, str], minutes: int) -> Case:
    return Case(alert=alert, why=why, series=series, minutes=minutes, fires=True)


def quiet(alert: str, why: str, series: dict[str, str], minutes: int) -> Case:
    return Case(alert=alert, why=why, series=series, minutes=minutes, fires=False)


CASES = [
    fires("LuthierJobStalled", "steps of 2 s, none for 25 min", {LAST: "0x60", STEP: "2x60"}, 25),
    quiet("LuthierJobStalled", "steps of 2 min, none for 30 min", {LAST: "0x60", STEP: "120x60"}, 30),
    quiet("LuthierJobStalled", "the job has ended, and its series with it", {LAST: "0x5", STEP: "2x5"}, 40),
    fires("LuthierJobStalled", "no step yet, for 25 min", {LAST: "0x60"}, 25),
    quiet("LuthierJobStalled", "no step yet, and its files come", {LAST: "0+60x60"}, 55),
    quiet("LuthierJobStalled", "no step yet, for 15 min", {LAST: "0x60"}, 15),
    quiet(
        "LuthierJobStalled",
        "slow steps beside a job that has made none",
        {LAST: "0x60", STEP: "120x60", LAST_OF_OTHER: "0+60x60"},
        30,
    ),
    fires(
        "LuthierLossNotFinite",
        "one more",
        {ENDED % ("failed", "request", "LOSS_NOT_FINITE"): "0x10 1x20"},
        15,
    ),
    quiet(
        "LuthierLossNotFinite",
        "one a day ago, then a restart, and failures of other kinds",
        {
            ENDED % ("failed", "request", "LOSS_NOT_FINITE"): "1x70 0x20",
            ENDED % ("failed", "request", "OUT_OF_MEMORY"): "0+1x90",
        },
        80,
    ),
    fires("LuthierCheckpointTooOld", "steps of 2 s", {CHECKPOINT: "0x200", STEP: "2x200"}, 80),
    quiet("LuthierCheckpointTooOld", "25 steps take 25 min", {CHECKPOINT: "0x200", STEP: "60x200"}, 80),
    fires("LuthierCheckpointTooOld", "steps of unknown length", {CHECKPOINT: "0x200"}, 80),
    quiet("LuthierCheckpointTooOld", "steps of unknown length, for 50 min", {CHECKPOINT: "0x200"}, 50),
    fires("LuthierQueueNotMoving", "a worker has room", {WAITING % "TURN": "1x20"}, 10),
    quiet(
        "LuthierQueueNotMoving",
        "behind long jobs for six hours",
        {
            WAITING % "BUSY": "5x370",
            "luthier_task_oldest_waiting_seconds{kind='TRAIN', project='p'}": "0+60x370",
        },
        360,
    ),
    quiet(
        "LuthierQueueNotMoving",
        "each is taken a moment later",
        {WAITING % "TURN": "1 0 1 0 1 0 1 0 1 0 1"},
        10,
    ),
    fires("LuthierNoWorker", "nobody takes the kind", {WAITING % "NO_WORKER": "2x20"}, 10),
    fires("LuthierNoWorker", "nobody has such a device", {WAITING % "NO_FITTING_WORKER": "1x20"}, 10),
    quiet(
        "LuthierNoWorker",
        "nobody is there, and nothing waits",
        {WAITING % "NO_WORKER": "0x20", "luthier_workers_able{kind='TRAIN'}": "0x20"},
        10,
    ),
    quiet("LuthierNoWorker", "a worker starts again", {WAITING % "NO_WORKER": "0 1 1 1 0x20"}, 10),
    fires(
        "LuthierLeasesLost", "one a minute", {"luthier_lease_expired_total{service='training'}": "0+1x20"}, 10
    ),
    quiet(
        "LuthierLeasesLost",
        "one worker died",
        {"luthier_lease_expired_total{service='training'}": "0x5 1x40"},
        20,
    ),
    fires("LuthierChildrenCrash", "again and again", {CHILDREN % "CRASHED": "0+1x60"}, 20),
    quiet(
        "LuthierChildrenCrash",
        "jobs that are too large, and one crash",
        {CHILDREN % "OUT_OF_MEMORY": "0+1x60", CHILDREN % "CRASHED": "0x10 1x50"},
        40,
    ),
    fires("LuthierServiceDown", "for three minutes", {"up{job='luthier', service='data'}": "1x5 0x10"}, 9),
    quiet("LuthierServiceDown", "a restart", {"up{job='luthier', service='data'}": "1x5 0 1x10"}, 9),
    fires(
        "LuthierEventLoopBlocked",
        "every time",
        {LAG % "0.5": "0x30", LAG % "2.0": "0+240x30", LAG % "+Inf": "0+240x30"},
        20,
    ),
    quiet(
        "LuthierEventLoopBlocked",
        "once a minute of 240 times",
        {LAG % "0.5": "0+239x30", LAG % "2.0": "0+240x30", LAG % "+Inf": "0+240x30"},
        20,
    ),
    fires("LuthierDiskBelowFloor", "less than it", {FREE: "9e8x10", FLOOR: "1e9x10"}, 5),
    quiet("LuthierDiskBelowFloor", "a floor of nothing", {FREE: "9e8x10", FLOOR: "0x10"}, 5),
    fires("LuthierDiskFillsUp", "10 MB a minute of 15 GB", {FREE: "15e9-1e7x480", FLOOR: "1e9x480"}, 420),
    quiet(
        "LuthierDiskFillsUp",
        "60 GB in an hour of 500 GB",
        {FREE: "500e9-1e9x60 440e9x60", FLOOR: "1e9x120"},
        100,
    ),
    fires(
        "LuthierDatabaseSlow",
        "each of one a second",
        {COMMITS % ("bucket", ", le='0.25'"): "0x60", COMMITS % ("bucket", ", le='1.0'"): "0+60x60"}
        | {COMMITS % ("bucket", ", le='+Inf'"): "0+60x60", COMMITS % ("count", ""): "0+60x60"},
        30,
    ),
    quiet(
        "LuthierDatabaseSlow",
        "one in five minutes",
        {COMMITS % ("bucket", ", le='0.25'"): "0x60", COMMITS % ("bucket", ", le='1.0'"): "0+0.2x60"}
        | {COMMITS % ("bucket", ", le='+Inf'"): "0+0.2x60", COMMITS % ("count", ""): "0+0.2x60"},
        30,
    ),
    fires("LuthierBlobStoreFailing", "again and again", {BLOBS % "INTERNAL": "0+1x20"}, 10),
    quiet(
        "LuthierBlobStoreFailing",
        "a full disk, and one hiccup",
        {BLOBS % "DISK_FULL": "0+5x20", BLOBS % "INTERNAL": "0x5 1x15"},
        10,
    ),
    fires(
        "LuthierWebhooksNotArriving",
        "the way out is shut, after a day in which they came",
        {
            UNTOLD: "0x60 0+60x90",
            ATTEMPTS % "confirmed": "0+1x60 60x90",
            ATTEMPTS % "unreachable": "0x60 0+1x90",
        },
        135,
    ),
    quiet(
        "LuthierWebhooksNotArriving",
        "one receiver is gone for hours, and one is told now and then",
        {
            UNTOLD: "0+60x240",
            ATTEMPTS % "confirmed": "0x29 1x30 2x30 3x30 4x130",
            ATTEMPTS % "refused": "0+1x240",
        },
        150,
    ),
    quiet(
        "LuthierWebhooksNotArriving",
        "a receiver is deployed for twenty minutes",
        {
            UNTOLD: "0x60 0+60x20 0x60",
            ATTEMPTS % "confirmed": "0x80 8x60",
            ATTEMPTS % "unreachable": "0x60 0+5x20 100x60",
        },
        79,
    ),
    quiet(
        "LuthierWebhooksNotArriving",
        "nobody wants to be told",
        {UNTOLD: "0x200", ATTEMPTS % "confirmed": "0x200"},
        150,
    ),
    fires("LuthierWebhooksNotSent", "no secret", {ATTEMPTS % "not_signed": "0+1x60"}, 20),
    fires("LuthierWebhooksNotSent", "a fault of the service", {ATTEMPTS % "failed": "0x10 0+2x30"}, 20),
    quiet(
        "LuthierWebhooksNotSent",
        "receivers refuse and sleep, and a host was taken off the list",
        {
            ATTEMPTS % "refused": "0+20x60",
            ATTEMPTS % "slow": "0+20x60",
            ATTEMPTS % "unreachable": "0+20x60",
            ATTEMPTS % "not_allowed": "0x20 1 2x15 3x60",
        },
        50,
    ),
    fires("LuthierCallsFail", "9 %", {CALLS % "OK": "0+60x120", CALLS % "Internal": "0+6x120"}, 70),
    quiet(
        "LuthierCallsFail",
        "a bad minute, a percent of five",
        {CALLS % "OK": "0+600x200", CALLS % "Internal": "0x60 20x100"},
        62,
    ),
    quiet(
        "LuthierCallsFail",
        "one of three calls at night",
        {CALLS % "OK": "0x30 2x60", CALLS % "Internal": "0x30 1x60"},
        40,
    ),
    quiet(
        "LuthierCallsFail",
        "callers' mistakes, refusals and workers that are away",
        {
            CALLS % "OK": "0+60x120",
            CALLS % "InvalidArgument": "0+60x120",
            CALLS % "ResourceExhausted": "0+60x120",
            WORKERS_CALLS % "OK": "0+60x120",
            WORKERS_CALLS % "Unavailable": "0+60x120",
        },
        70,
    ),
    fires(
        "LuthierCallsSlow",
        "half of them",
        {
            CALLS % "OK": "0+60x120",
            TIMES % ("bucket", ", le='1.0'"): "0+30x120",
            TIMES % ("count", ""): "0+60x120",
        },
        70,
    ),
    quiet(
        "LuthierCallsSlow",
        "workers that wait for work",
        {
            CALLS % "OK": "0+60x120",
            TIMES % ("bucket", ", le='1.0'"): "0+60x120",
            TIMES % ("count", ""): "0+60x120",
            CLAIMS % ("bucket", ", le='1.0'"): "0x120",
            CLAIMS % ("count", ""): "0+60x120",
        },
        70,
    ),
    fires(
        "LuthierWorkFails",
        "one of eleven",
        {
            ENDED % ("succeeded", "NONE", "NONE"): "0+1x400",
            ENDED % ("failed", "service", "WORKER_LOST"): "0+0.1x400",
        },
        380,
    ),
    quiet(
        "LuthierWorkFails",
        "requests that cannot be done",
        {
            ENDED % ("succeeded", "NONE", "NONE"): "0+1x400",
            ENDED % ("failed", "service", "WORKER_LOST"): "0x400",
            ENDED % ("failed", "request", "LOSS_NOT_FINITE"): "0+1x400",
        },
        380,
    ),
    quiet(
        "LuthierWorkFails",
        "one of three in a quiet night",
        {
            ENDED % ("succeeded", "NONE", "NONE"): "0x300 2x100",
            ENDED % ("failed", "service", "WORKER_LOST"): "0x300 1x100",
        },
        380,
    ),
]


def test_every_alert_is_seen_to_fire_and_to_stay_quiet() -> None:
    seen = {(case.alert, case.fires) for case in CASES}
    assert seen == {(alert.alert, fires) for alert in ALERTS for fires in (True, False)}


def rules_of(alert: str) -> str:
    """The rules that an alert is made of, and no others: each takes its time at each minute."""
    wanted = [rule for rule in ALERTS if rule.alert == alert]
    exprs = " ".join(rule.expr for rule in wanted)
    recorded = [rule for group in recording.GROUPS.values() for rule in group if rule.record in exprs]
    return group_text("a test", {"recorded": recorded, "alerts": wanted} if recorded else {"alerts": wanted})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alerts(case: Case, promtool: Promtool, tmp_path: Path) -> None:
    expr = f'count by (alertname) (ALERTS{{alertname="{case.alert}", alertstate="firing"}}) > bool 0'
    labels = f'{{alertname="{case.alert}"}}'
    series = [{"series": name.replace("'", '"'), "values": values} for name, values in case.series.items()]
    rules = tmp_path / "rules.yml"
    rules.write_text(rules_of(case.alert))
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": expr,
                        "eval_time": f"{case.minutes}m",
                        "exp_samples": [{"labels": labels, "value": 1}] if case.fires else [],
                    }
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(json.dumps(test))  # JSON is YAML
    promtool(["test", "rules", path], "")
