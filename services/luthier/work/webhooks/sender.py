"""Sends what is in the outbox until it has arrived: at least once, with a bounded age, each receiver for itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from luthier.errors import LuthierError
from luthier.runtime.catalogue import webhooks
from luthier.storage.database import Database
from luthier.v1.webhook_pb2 import WebhookDelivery
from luthier.work.webhooks import outbox
from luthier.work.webhooks.config import WebhookConfig
from luthier.work.webhooks.outbox import Delivery
from luthier.work.webhooks.posting import Answer, Misunderstood, post, trust
from luthier.work.webhooks.signing import secrets_of, signed_headers
from luthier.work.webhooks.targets import NotAllowed, Target, Targets, target_of

State = WebhookDelivery.State
SWEEP_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 3600.0
_GROWTH = 3.0
_LANES = 64
_LANES_OF_ORIGIN = 2
# One host has 65535 origins, and an entry of the operator's list may be all of them.
_LANES_OF_HOST = 4
# What cannot be noted would be sent again at once.
_UNNOTED_SECONDS = 60.0
_FORGET_BATCH = 500
_GONE = 410
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """How an attempt ended.

    Attributes:
        result: one of `webhooks.RESULTS`.
        status_code: what was answered; 0: nothing.
        error: what went wrong, in words that hold no URL; empty: nothing.
        wait_seconds: what the receiver wants to be given before the next one.
    """

    result: str
    status_code: int = 0
    error: str = ""
    wait_seconds: float = 0.0


@dataclass(slots=True)
class _Lanes:
    """The lanes of a receiver.

    Attributes:
        number: that send.
        sent: what they send just now.
        project: whose turn was the last.
        choosing: two lanes must not choose the same one.
    """

    number: int = 0
    sent: set[str] = field(default_factory=set)
    project: str = ""
    choosing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sender:
    """Sends the deliveries of one service. For one event loop; `close` it at the end.

    A few lanes for each receiver, each an attempt after the other, so that one that is dead or slow takes nobody
    else's time. A lane ends with its first failure: what is left waits for the next sweep, after everybody else.

    Args:
        database: where the outbox is.
        targets: where webhooks may go.
        secret_file: what receivers' secrets are made from; read anew for each attempt, so that it can be changed.
        config: times, and whose certificates are believed.
        registry: gets the metrics.

    Raises:
        InvalidArgument: there are no certificates where they should be.
    """

    def __init__(
        self,
        database: Database,
        targets: Targets,
        secret_file: Path,
        config: WebhookConfig,
        registry: CollectorRegistry,
    ) -> None:
        self._database = database
        self._targets = targets
        self._secret_file = secret_file
        self._config = config
        self._trusted: ssl.SSLContext = trust(config.ca_file)
        self._attempts = webhooks.ATTEMPTS.counter(registry)
        self._deliveries = webhooks.DELIVERIES.counter(registry)
        self._seconds = webhooks.SECONDS.histogram(registry)
        self._waiting = webhooks.WAITING.gauge(registry)
        self._oldest = webhooks.OLDEST.gauge(registry)
        for result in webhooks.RESULTS:
            self._attempts.labels(result)
        for outcome in ("delivered", "given_up"):
            self._deliveries.labels(outcome)
        self._receivers: dict[outbox.Receiver, _Lanes] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def sweep(self) -> None:
        """Begin to send what is due, and show what waits."""
        hosts: Counter[str] = Counter()
        for receiver, lanes in self._receivers.items():
            hosts[receiver.host] += lanes.number
        free = _LANES - hosts.total()
        full_hosts = [host for host, number in hosts.items() if number >= _LANES_OF_HOST]
        full = [one.origin for one, lanes in self._receivers.items() if lanes.number >= _LANES_OF_ORIGIN]
        limits = outbox.DueLimits(of_host=_LANES_OF_HOST, all=free)
        async with self._database.reading() as connection:
            found = await outbox.waiting(connection)
            is_looking = free > 0 and found.number
            due = await outbox.due_receivers(connection, full_hosts, full, limits) if is_looking else ()
        self._waiting.set(found.number)
        self._oldest.set(found.oldest_seconds)
        if not found.number:
            self._receivers = {one: lanes for one, lanes in self._receivers.items() if lanes.number}
        for receiver, number in due:
            lanes = self._receivers.setdefault(receiver, _Lanes())
            room = min(_LANES_OF_ORIGIN - lanes.number, _LANES_OF_HOST - hosts[receiver.host], free)
            for _ in range(min(number, room)):
                free -= 1
                hosts[receiver.host] += 1
                lanes.number += 1
                task = asyncio.create_task(self._lane(receiver, lanes))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def forget_ended(self, keep_seconds: float) -> None:
        """Delete deliveries that were over longer ago, 0: none; a batch a transaction."""
        if keep_seconds == 0:
            return
        while True:
            # A disk that is full of them must not keep them.
            async with self._database.transaction(makes_room=True) as connection:
                number = await outbox.forget_ended(connection, keep_seconds, _FORGET_BATCH)
            if number < _FORGET_BATCH:
                return

    def close(self) -> None:
        """Send no more: what is on its way is sent again by the next process."""
        for task in self._tasks:
            task.cancel()

    async def _lane(self, receiver: outbox.Receiver, lanes: _Lanes) -> None:
        try:
            while (delivery := await self._next(receiver, lanes)) is not None and await self._deliver(
                delivery, lanes
            ):
                pass
        except Exception:  # the next sweep may do better
            _logger.exception("webhooks at %s cannot be sent", receiver.origin)
            await asyncio.sleep(_UNNOTED_SECONDS)
        finally:
            lanes.number -= 1

    async def _next(self, receiver: outbox.Receiver, lanes: _Lanes) -> Delivery | None:
        async with lanes.choosing:
            # As it was before the database is looked at: what leaves it meanwhile may be due still in what is read.
            sent = frozenset(lanes.sent)
            async with self._database.reading() as connection:
                delivery = await outbox.next_due(connection, receiver, sent, lanes.project)
            if delivery is not None:
                lanes.sent.add(delivery.delivery_id)
                lanes.project = delivery.project
            return delivery

    async def _deliver(self, delivery: Delivery, lanes: _Lanes) -> bool:
        """Make one attempt and note how it ended; tell whether it arrived."""
        try:
            return await self._deliver_noted(delivery)
        finally:
            lanes.sent.discard(delivery.delivery_id)

    async def _deliver_noted(self, delivery: Delivery) -> bool:
        began = time.monotonic()
        attempted = await self._attempt(delivery)
        self._seconds.observe(time.monotonic() - began)
        self._attempts.labels(attempted.result).inc()
        state, wait_seconds = self._following(delivery, attempted)
        # Room is kept for it: what is not noted is sent again.
        async with self._database.transaction(makes_room=True) as connection:
            await outbox.settle(
                connection,
                delivery,
                state,
                status_code=attempted.status_code,
                error=attempted.error,
                wait_seconds=wait_seconds,
            )
        self._tell(delivery, attempted, state, wait_seconds)
        return state == State.STATE_DELIVERED

    async def _attempt(self, delivery: Delivery) -> Attempted:
        try:
            target = target_of(delivery.url)
        except ValueError as error:
            return Attempted(result="not_allowed", error=f"the URL {error}")
        try:
            secrets = secrets_of(self._secret_file, target.origin, delivery.project)
        except (LuthierError, OSError, ValueError) as error:
            # Whoever reads the delivery has nothing to do with the service's files.
            _logger.error("webhooks cannot be signed: %s", error)
            return Attempted(result="not_signed", error="the service has no secret to sign it with")
        try:
            return await self._posted(delivery, target, secrets)
        except Exception as error:  # it is tried again, and not for ever
            # The words of an error that nobody thought of may hold the URL.
            at = traceback.extract_tb(error.__traceback__)[-1]
            _logger.error("a webhook failed by %s at %s:%d", type(error).__name__, at.filename, at.lineno)
            return Attempted(result="failed", error="the service failed to send it")

    async def _posted(self, delivery: Delivery, target: Target, secrets: Sequence[str]) -> Attempted:
        timeout = self._config.timeout_seconds
        deadline = asyncio.get_running_loop().time() + timeout
        headers = signed_headers(secrets, delivery.delivery_id, int(time.time()), delivery.body)
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self._targets.addresses(target)
                answer = await post(
                    addresses, target, headers, delivery.body, trusted=self._trusted, deadline=deadline
                )
        except NotAllowed as error:
            return Attempted(result="not_allowed", error=str(error))
        except Misunderstood as error:
            return Attempted(result="misunderstood", error=f"{target.origin}: {error}")
        except TimeoutError:
            return Attempted(result="slow", error=f"{target.origin} did not answer within {timeout:g} s")
        except OSError as error:
            return Attempted(result="unreachable", error=f"{target.origin} cannot be reached: {_why(error)}")
        return _attempted(target, answer)

    def _following(
        self, delivery: Delivery, attempted: Attempted
    ) -> tuple[WebhookDelivery.State.ValueType, float]:
        """Return where a delivery stands after an attempt, and how long it waits for the next one."""
        if attempted.result == "confirmed":
            return State.STATE_DELIVERED, 0.0
        age_seconds = time.time() - delivery.created_at_us / 1e6
        left_seconds = self._config.max_age_seconds - age_seconds
        growth = _GROWTH ** min(delivery.attempts, 20)
        delay = min(self._config.first_delay_seconds * growth, _LONGEST_DELAY_SECONDS)
        # Not all at once: whoever was away comes back to many.
        wait_seconds = max(delay * random.uniform(0.8, 1.2), attempted.wait_seconds)
        if attempted.status_code == _GONE or wait_seconds > left_seconds:
            return State.STATE_GIVEN_UP, 0.0
        return State.STATE_PENDING, wait_seconds

    def _tell(
        self,
        delivery: Delivery,
        attempted: Attempted,
        state: WebhookDelivery.State.ValueType,
        wait_seconds: float,
    ) -> None:
        about = {"delivery": delivery.delivery_id, "resource": delivery.name}
        if state == State.STATE_DELIVERED:
            self._deliveries.labels("delivered").inc()
            _logger.info("webhook delivered", extra=about)
        elif state == State.STATE_GIVEN_UP:
            self._deliveries.labels("given_up").inc()
            _logger.error(
                "webhook given up after %d attempts: %s", delivery.attempts + 1, attempted.error, extra=about
            )
        else:
            _logger.warning(
                "webhook not delivered, tried again in %.0f s: %s", wait_seconds, attempted.error, extra=about
            )


def _attempted(target: Target, answer: Answer) -> Attempted:
    if 200 <= answer.status < 300:
        return Attempted(result="confirmed", status_code=answer.status)
    said = f"{target.origin} answered {answer.status}"
    if 300 <= answer.status < 400:
        said += ": redirects are not followed, name where it leads"
    return Attempted(
        result="refused",
        status_code=answer.status,
        error=said,
        wait_seconds=answer.retry_after_seconds,
    )


def _why(error: OSError) -> str:
    """Return what is wrong without the address: that is nothing for whoever wrote the URL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not believed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason or type(error).__name__}"
    if isinstance(error, socket.gaierror):
        return error.strerror or "its name is not known"
    return os.strerror(error.errno) if error.errno else type(error).__name__
