"""The stages of every call, in their order: request id, metrics, access log, errors, credentials, request."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
from grpc import aio

from luthier.errors import Internal, LuthierError, ResourceExhausted, Unavailable, Unimplemented
from luthier.errors.reasons import Reason
from luthier.runtime.admission import HEALTH_SERVICE, AdmissionMetrics
from luthier.runtime.auth import Authenticator, Principal, confine, permit, set_principal
from luthier.runtime.call_metrics import CallMetrics
from luthier.runtime.calls import Call, Stage
from luthier.runtime.logs import bind
from luthier.runtime.named_resources import subject_of
from luthier.runtime.names import project_named
from luthier.runtime.policies import Policy, Rule
from luthier.runtime.status import printable, to_code, to_trailer

REQUEST_ID_KEY = "x-request-id"

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
# The caller's clock ends a call a little before ours: its cancellation arrives with time left on our side.
_DEADLINE_SLACK_SECONDS = 0.1
_SHED_LINE_SECONDS = 1.0
_access = logging.getLogger("luthier.access")
_log = logging.getLogger(__name__)


class InFlight:
    """The calls in progress, so that a stopping server can end those that would go on for ever."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()

    @asynccontextmanager
    async def stage(self, call: Call) -> AsyncIterator[None]:
        """Count the call as in progress."""
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def interrupt_streams(self) -> None:
        """End every call that streams responses: its caller resumes elsewhere or later."""
        for call in tuple(self._calls):
            if call.type in ("server_stream", "bidi_stream"):
                call.interrupt()

    def interrupt_all(self) -> None:
        """End every call."""
        for call in tuple(self._calls):
            call.interrupt()

    def __len__(self) -> int:
        return len(self._calls)


@asynccontextmanager
async def request_id_stage(call: Call) -> AsyncIterator[None]:
    """Take the caller's `x-request-id` or make one; it is in the log, and in the trailing metadata of the answer."""
    given = call.metadata(REQUEST_ID_KEY) or ""
    call.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    call.trailers[REQUEST_ID_KEY] = call.request_id
    call.context.set_trailing_metadata(tuple(call.trailers.items()))
    with bind(request_id=call.request_id):
        yield


def metrics_stage(metrics: CallMetrics) -> Stage:
    """Return the stage that counts and times calls."""

    @asynccontextmanager
    async def stage(call: Call) -> AsyncIterator[None]:
        started = time.perf_counter()
        metrics.started(call)
        try:
            yield
        finally:
            metrics.handled(call, time.perf_counter() - started)

    return stage


class AccessLog:
    """Writes one line for each call, when it is over.

    Health checks only at DEBUG. Of calls that no slot was free for one line a second, with how many came before
    it: who is flooded needs its time for something else.
    """

    def __init__(self) -> None:
        self._shed = 0
        self._quiet_until = 0.0

    @asynccontextmanager
    async def stage(self, call: Call) -> AsyncIterator[None]:
        """Time the call and write its line."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if call.shed_by:
                self.shed(call.method, call.principal, started)
            else:
                self._write(call, started)

    def shed(self, method: str, principal: object, now: float) -> None:
        """Write or count a call that no slot was free for; `now` is of `time.perf_counter`."""
        if now < self._quiet_until:
            self._shed += 1
            return
        self._quiet_until = now + _SHED_LINE_SECONDS
        code = grpc.StatusCode.RESOURCE_EXHAUSTED.name
        fields = {
            "method": method,
            "code": code,
            "reason": str(Reason.OVERLOADED),
            "principal": str(principal),
        }
        _access.info("%s %s", method, code, extra={**fields, "shed_before": self._shed})
        self._shed = 0

    def _write(self, call: Call, started: float) -> None:
        level = logging.DEBUG if call.method.startswith(HEALTH_SERVICE) else logging.INFO
        told = {"subject": call.subject, "project": project_named(call.subject), "detail": call.detail}
        _access.log(
            level,
            "%s %s",
            call.method,
            call.code.name,
            extra={
                "method": call.method,
                "code": call.code.name,
                "reason": call.reason,
                "principal": call.principal,
                "duration_seconds": round(time.perf_counter() - started, 6),
                "messages_received": call.received,
                "messages_sent": call.sent,
                **{name: value for name, value in told.items() if value},
            },
        )


def error_stage(metrics: AdmissionMetrics) -> Stage:
    """Return the stage that ends a failed call with the status of its error, and counts what was used up.

    An error that is no LuthierError is a fault of ours: it is logged with its trace and told as INTERNAL with
    nothing but the request id. Cancellation passes, unless it is the server's own on its way down.
    """

    @asynccontextmanager
    async def stage(call: Call) -> AsyncIterator[None]:
        async with _ended_by_status(call):
            try:
                yield
            except ResourceExhausted as error:
                metrics.refused(call.shed_by, error.reason)
                raise

    return stage


@asynccontextmanager
async def _ended_by_status(call: Call) -> AsyncIterator[None]:
    try:
        yield
    except LuthierError as error:
        await _abort(call, error)
    except aio.AbortError:
        call.code = _code_of(call)
        raise
    except asyncio.CancelledError:
        if not call.interrupted:
            remaining = call.context.time_remaining()
            late = remaining is not None and remaining <= _DEADLINE_SLACK_SECONDS
            call.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        if call.task is not None:
            call.task.uncancel()
        await _abort(
            call,
            Unavailable(
                "the service is stopping; call again",
                reason=Reason.SHUTTING_DOWN,
                retry_after_seconds=1.0,
            ),
        )
    except Exception as error:
        if isinstance(error, NotImplementedError) and _code_of(call) is grpc.StatusCode.UNIMPLEMENTED:
            # A generated servicer says so of methods that nobody wrote.
            await _abort(call, Unimplemented(f"this service has no {call.method}"))
        _log.exception("unhandled error in %s", call.method)
        await _abort(
            call,
            Internal(
                f"the service failed; its log has more under request id {call.request_id}",
                metadata={"request_id": call.request_id},
            ),
        )


def auth_stage(authenticator: Authenticator, policy: Policy) -> Stage:
    """Return the stage that lets pass who may make the call, about what it is. Health checks need no credential.

    What a call is about stands in its messages, of a stream in each: they are looked at as they come.
    """

    @asynccontextmanager
    async def stage(call: Call) -> AsyncIterator[None]:
        if call.method.startswith(HEALTH_SERVICE):
            call.examine = lambda _: None
            yield
            return
        principal = call.caller or authenticator.authenticate(call.metadata("authorization"))
        call.principal = str(principal)
        rule = permit(principal, call.method, policy)
        set_principal(principal)
        call.examine = partial(_examine, call, principal, rule)
        if principal.kind != "task":
            yield
            return
        with bind(project=", ".join(principal.projects or ())):
            yield

    return stage


def _examine(call: Call, principal: Principal, rule: Rule, message: Any) -> None:
    # Before it is looked at: the log says what a refused call was about.
    call.subject = call.subject or subject_of(message, rule.subject)
    confine(principal, message, rule, is_first=call.received == 1)


@asynccontextmanager
async def request_stage(call: Call) -> AsyncIterator[None]:
    """Read the request."""
    await call.receive()
    yield


async def _abort(call: Call, error: LuthierError) -> None:
    call.code = to_code(error)
    call.reason = str(error.reason)
    call.detail = printable(error.message)
    key, details = to_trailer(error, call.request_id)
    await call.context.abort(call.code, printable(error.message), (*call.trailers.items(), (key, details)))


def _code_of(call: Call) -> grpc.StatusCode:
    code = call.context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN)
