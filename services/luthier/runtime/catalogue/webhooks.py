"""Webhooks that are told that a resource has ended."""

from luthier.runtime.metric import Metric, Service

_SENDERS: tuple[Service, ...] = ("training", "evaluation")
RESULTS = (
    "confirmed",
    "refused",
    "unreachable",
    "slow",
    "misunderstood",
    "not_allowed",
    "not_signed",
    "failed",
)
"""How an attempt ends: a status of 2xx, another one, nobody takes the connection, no answer in time, an answer that is
none, an address that may not be called, a secret that cannot be read, a fault of the service."""

ATTEMPTS = Metric(
    name="luthier_webhook_attempts_total",
    kind="counter",
    help="Attempts to tell a webhook that a resource has ended, by how they ended.",
    question="Why do webhooks not arrive?",
    labels=("result",),
    services=_SENDERS,
    bound="one a result: confirmed, refused, unreachable, slow, misunderstood, not_allowed, not_signed, failed",
)
DELIVERIES = Metric(
    name="luthier_webhook_deliveries_total",
    kind="counter",
    help="Deliveries that are over: confirmed by their receiver (delivered), or tried no more (given_up).",
    question="Is somebody not told?",
    labels=("outcome",),
    services=_SENDERS,
    bound="one an outcome: delivered, given_up",
)
SECONDS = Metric(
    name="luthier_webhook_attempt_seconds",
    kind="histogram",
    help="Time of an attempt, from finding the address to the answer.",
    question="Are receivers slow?",
    unit="seconds",
    buckets=(0.01, 0.05, 0.25, 1.0, 5.0, 15.0),
    services=_SENDERS,
    bound="9",
)
WAITING = Metric(
    name="luthier_webhook_deliveries_waiting",
    kind="gauge",
    help="Deliveries that have not arrived yet, those that are put off among them.",
    question="Do deliveries pile up?",
    services=_SENDERS,
)
OLDEST = Metric(
    name="luthier_webhook_oldest_waiting_seconds",
    kind="gauge",
    help="Time since the resource ended whose delivery waits the longest; 0 where none waits.",
    question="For how long has somebody not been told?",
    unit="seconds",
    services=_SENDERS,
)
