"""What is to be told to webhooks, in SQL: written in the transaction that ends a resource, kept until it arrives."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import ColumnElement, Row, Select, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors.status import status_to_failure
from luthier.runtime.names import project_of
from luthier.storage.resource_messages import StatefulMessage
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work.schema import deliveries
from luthier.work.webhooks.targets import target_of

State = WebhookDelivery.State
_PENDING = "PENDING"
_OVER = ("DELIVERED", "GIVEN_UP")
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What is to be sent.

    Attributes:
        delivery_id: the same in every attempt.
        name: of the resource that has ended.
        project: that it is in.
        url: where it goes.
        body: JSON, the same in every attempt.
        attempts: so far.
        created_at_us: when the resource ended.
    """

    delivery_id: str
    name: str
    project: str
    url: str = field(repr=False)
    body: bytes = field(repr=False)
    attempts: int
    created_at_us: int


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where deliveries go: `origin` is scheme, host and port; both empty for a URL that is none any more."""

    host: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How many deliveries have not arrived, and since when the first of them waits."""

    number: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DueLimits:
    """How many receivers are taken at most: of one host, and in all."""

    of_host: int
    all: int


async def record(
    connection: AsyncConnection, uid: str, message: StatefulMessage, webhooks: Sequence[Webhook], state: str
) -> None:
    """Note, in the caller's transaction, that a resource has ended in a state, for each of its webhooks."""
    now_us = _now_us()
    event_type, body = _event(message, state, now_us)
    rows = [
        {
            "delivery_id": f"msg_{secrets.token_hex(16)}",
            "uid": uid,
            "number": number,
            "name": message.name,
            "event_type": event_type,
            "url": webhook.url,
            "project": project_of(message.name),
            **asdict(_receiver(webhook.url)),
            "body": body,
            "state": _PENDING,
            "created_at_us": now_us,
            "not_before_us": now_us,
            "attempts": 0,
            "last_attempt_at_us": 0,
            "last_status_code": 0,
            "last_error": "",
            "ended_at_us": 0,
        }
        for number, webhook in enumerate(webhooks, start=1)
    ]
    if rows:
        await connection.execute(insert(deliveries), rows)


def _receiver(url: str) -> Receiver:
    """Return where a URL leads; nowhere for one that an earlier version took: an end must not fail by it."""
    try:
        target = target_of(url)
    except ValueError:
        return Receiver("", "")
    return Receiver(target.host, target.origin)


def _event(message: StatefulMessage, state: str, now_us: int) -> tuple[str, bytes]:
    """Return the type of an event and its JSON: names, times and a reason, and nothing of what was learnt or asked."""
    kind = _WORDS.sub("_", message.DESCRIPTOR.name).lower()
    event_type = f"{kind}.{state.lower()}"
    data = {
        "name": message.name,
        "uid": message.uid,
        "project": f"projects/{project_of(message.name)}",
        "state": state,
        "create_time": message.create_time.ToJsonString(),
    }
    if message.HasField("error"):
        data["reason"] = str(status_to_failure(message.error).reason)
    event = {"type": event_type, "timestamp": _time(now_us).ToJsonString(), "data": data}
    return event_type, json.dumps(event, separators=(",", ":")).encode()


async def due_receivers(
    connection: AsyncConnection, full_hosts: Collection[str], full_origins: Collection[str], limits: DueLimits
) -> Sequence[tuple[Receiver, int]]:
    """Return receivers that are not full, each with how many deliveries are due there.

    Those that have something that was never tried come first: what fails again and again holds up nobody.
    """
    table = deliveries.c
    urgency = func.min(table.attempts).label("attempts"), func.min(table.not_before_us).label("since_us")
    found = (
        select(table.host, table.origin, func.count().label("number"), *urgency)
        .where(*_is_due(), table.host.not_in(list(full_hosts)), table.origin.not_in(list(full_origins)))
        .group_by(table.host, table.origin)
        .subquery()
    )
    order = found.c.attempts, found.c.since_us
    # A host has as many receivers as it has ports: it must not take the places of the others.
    place = func.row_number().over(partition_by=found.c.host, order_by=order).label("place")
    placed = select(found, place).subquery()
    statement = (
        select(placed)
        .where(placed.c.place <= limits.of_host)
        .order_by(placed.c.attempts, placed.c.since_us)
        .limit(limits.all)
    )
    return [(Receiver(row.host, row.origin), row.number) for row in await connection.execute(statement)]


async def next_due(
    connection: AsyncConnection, receiver: Receiver, sent: Collection[str], after: str = ""
) -> Delivery | None:
    """Return what is due next at a receiver, less what is being sent, or None.

    It is of the first project after `after`, and then of those before: each has its turn. Of a project's, first what
    was tried the fewest times.
    """
    project = deliveries.c.project
    return await first_due_of(connection, receiver, sent, project > after) or await first_due_of(
        connection, receiver, sent, project <= after
    )


async def first_due_of(
    connection: AsyncConnection, receiver: Receiver, sent: Collection[str], of_project: ColumnElement[bool]
) -> Delivery | None:
    """Return what is due next at a receiver of some projects, less what is being sent, or None."""
    row = (await connection.execute(first_due(receiver, sent, of_project))).first()
    if row is None:
        return None
    return Delivery(
        delivery_id=row.delivery_id,
        name=row.name,
        project=row.project,
        url=row.url,
        body=row.body,
        attempts=row.attempts,
        created_at_us=row.created_at_us,
    )


def first_due(receiver: Receiver, sent: Collection[str], of_project: ColumnElement[bool]) -> Select[Any]:
    """Return the statement that finds the first delivery of some projects; in the order of its index."""
    table = deliveries.c
    return (
        select(deliveries)
        .where(*_is_due(), table.host == receiver.host, table.origin == receiver.origin, of_project)
        .where(table.delivery_id.not_in(list(sent)))
        .order_by(table.project, table.attempts, table.not_before_us)
        .limit(1)
    )


def _is_due() -> Sequence[Any]:
    return deliveries.c.state == _PENDING, deliveries.c.not_before_us <= _now_us()


async def settle(
    connection: AsyncConnection,
    delivery: Delivery,
    state: WebhookDelivery.State.ValueType,
    *,
    status_code: int = 0,
    error: str = "",
    wait_seconds: float = 0.0,
) -> None:
    """Note how an attempt ended; one that is PENDING still is due again after a while."""
    now_us = _now_us()
    is_pending = state == State.STATE_PENDING
    changes = {
        "state": State.Name(state).removeprefix("STATE_"),
        "attempts": delivery.attempts + 1,
        "last_attempt_at_us": now_us,
        "last_status_code": status_code,
        "last_error": error,
        "not_before_us": now_us + round(wait_seconds * 1e6) if is_pending else 0,
        "ended_at_us": 0 if is_pending else now_us,
    }
    found = deliveries.c.delivery_id == delivery.delivery_id
    await connection.execute(update(deliveries).where(found).values(changes))


async def waiting(connection: AsyncConnection) -> Waiting:
    """Return what has not arrived yet."""
    statement = select(func.count(), func.min(deliveries.c.created_at_us)).where(
        deliveries.c.state == _PENDING
    )
    number, since_us = (await connection.execute(statement)).one()
    oldest_seconds = max(0.0, (_now_us() - since_us) / 1e6) if number else 0.0
    return Waiting(number=number, oldest_seconds=oldest_seconds)


async def of_resource(
    connection: AsyncConnection, uid: str, after: int, limit: int
) -> Sequence[tuple[int, WebhookDelivery]]:
    """Return at most `limit` deliveries of the resource of a uid after a number, each with its own."""
    statement = (
        select(deliveries)
        .where(deliveries.c.uid == uid, deliveries.c.number > after)
        .order_by(deliveries.c.number)
        .limit(limit)
    )
    return [(row.number, _message(row)) for row in await connection.execute(statement)]


async def forget_ended(connection: AsyncConnection, older_than_seconds: float, most: int) -> int:
    """Delete at most `most` deliveries that arrived or were given up longer ago than that; returns how many."""
    ended = (
        select(deliveries.c.delivery_id)
        .where(
            deliveries.c.state.in_(_OVER),
            deliveries.c.ended_at_us < _now_us() - round(older_than_seconds * 1e6),
        )
        .limit(most)
    )
    return (await connection.execute(delete(deliveries).where(deliveries.c.delivery_id.in_(ended)))).rowcount


def _message(row: Row[Any]) -> WebhookDelivery:
    return WebhookDelivery(
        delivery_id=row.delivery_id,
        url=row.url,
        event_type=row.event_type,
        state=State.Value(f"STATE_{row.state}"),
        num_attempts=row.attempts,
        create_time=_time(row.created_at_us),
        last_attempt_time=_time(row.last_attempt_at_us) if row.last_attempt_at_us else None,
        next_attempt_time=_time(row.not_before_us) if row.state == _PENDING else None,
        end_time=_time(row.ended_at_us) if row.ended_at_us else None,
        last_status_code=row.last_status_code,
        last_error=row.last_error,
    )


def _time(us: int) -> Timestamp:
    time_ = Timestamp()
    time_.FromMicroseconds(us)
    return time_


def _now_us() -> int:
    return time.time_ns() // 1000
