"""Serve gRPC: bind, guard, observe, report health, and stop without dropping calls."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.runtime import tracing
from luthier.runtime.about import about_stage
from luthier.runtime.addresses import is_loopback
from luthier.runtime.admission import HEALTH_SERVICE, Admission, AdmissionMetrics, Limits
from luthier.runtime.auth import Authenticator
from luthier.runtime.calls import CallType, StagedMethods, call_type
from luthier.runtime.granted_keys import KEY_ROLES
from luthier.runtime.health import Health
from luthier.runtime.idempotency import Idempotency, RequestLog
from luthier.runtime.intake import Intake
from luthier.runtime.interceptors import (
    AccessLog,
    InFlight,
    auth_stage,
    error_stage,
    metrics_stage,
    request_id_stage,
    request_stage,
)
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.policies import Policy, Rule
from luthier.runtime.shedding import Shedding
from luthier.runtime.trace_stage import trace_stage

MAX_MESSAGE_BYTES = 4 << 20
_FAREWELL_SECONDS = 1.0
_SPARE = 16
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_REFLECTING = Rule(roles=frozenset(KEY_ROLES), subjectless="it is about what all services are made of")
_OWN_LANES = frozenset({"grpc.health.v1.Health", "luthier.worker.v1.WorkerService"})
"""Services whose calls pass a flood of others: who waits for them in vain ends a process, or a worker's lease."""
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second process on the port is a mistake, not a replica
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Beyond these gRPC cancels calls that it has not handed over, without a word. By default beyond 1,000.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where to serve, and how to stop.

    Attributes:
        address: host:port; port 0 takes a free one. Only loopback: other addresses need TLS.
        drain_seconds: time between telling NOT_SERVING and refusing new calls.
        grace_seconds: time that unary calls in progress get to end.
        limits: calls at once, by kind of caller.
    """

    address: str
    drain_seconds: float = 0.2
    grace_seconds: float = 10.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A servicer, the generated function that adds it to a server, and its service's full name."""

    add: Callable[[Any, Any], None]
    servicer: object
    name: str


def of_families(
    service: ServiceDescriptor, add: Callable[[Any, Any], None], families: Sequence[object]
) -> Registration:
    """Return how to add a service whose every method is of one of the families."""
    methods = {}
    for method in service.methods:
        found = [family for family in families if hasattr(family, method.name)]
        assert len(found) == 1, f"{method.name} must be of one family, it is of {len(found)}"
        methods[method.name] = getattr(found[0], method.name)
    return Registration(add=add, servicer=SimpleNamespace(**methods), name=service.full_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that serves."""

    port: int
    metrics_port: int
    health: Health


@asynccontextmanager
async def serving(
    options: ServerOptions,
    registrations: Sequence[Registration],
    *,
    authenticator: Authenticator,
    policy: Policy,
    request_log: RequestLog,
    metrics: MetricsServer,
) -> AsyncIterator[Running]:
    """Serve for the length of a block, then drain and stop.

    Raises:
        InvalidArgument: the address is not host:port, or not on loopback.
        FailedPrecondition: the port is taken.
        AssertionError: a method has no policy, or a policy no method.
    """
    check_loopback(options.address)
    in_flight = InFlight()
    policy = {**policy, _REFLECTION: _REFLECTING}
    staged, intake = _staged(options, in_flight, metrics, authenticator, policy, request_log)
    server = aio.server(
        handlers=[staged, intake],
        options=_OPTIONS,
        # Never what refuses: it cannot tell callers apart and gives no reason.
        maximum_concurrent_rpcs=_SPARE * options.limits.most,
    )
    health = Health()
    methods = _Methods(staged, server)
    names = [registration.name for registration in registrations]
    # Not by `enable_server_reflection`, which takes our `_Methods` for a server of threads.
    reflecting = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflecting, methods)
    health_pb2_grpc.add_HealthServicer_to_server(health, methods)
    for registration in registrations:
        registration.add(registration.servicer, methods)
    methods.require_policies(policy)
    for method in (*policy, _HEALTH_CHECK, _HEALTH_WATCH):
        metrics.calls.prepare(method, methods.type_of(method))
    async with AsyncExitStack() as stack:
        metrics_port = await stack.enter_async_context(metrics.serving())
        port = _bind(server, options.address)
        await server.start()
        host = options.address.rpartition(":")[0]
        await stack.enter_async_context(intake.measured(f"{host}:{port}"))
        for name in ("", *names):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        _logger.info("serving", extra={"port": port, "metrics_port": metrics_port})
        try:
            yield Running(port=port, metrics_port=metrics_port, health=health)
        finally:
            await health.enter_graceful_shutdown()
            await asyncio.sleep(options.drain_seconds)
            await _stop(server, in_flight, options.grace_seconds)
            _logger.info("stopped")


async def stop_signal() -> None:
    """Return when the process is told to stop: SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await stopping.wait()


def check_loopback(address: str) -> None:
    """Raise InvalidArgument unless an address is host:port on loopback."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidArgument(f"an address must be host:port, e.g. 127.0.0.1:7601, got {address!r}")
    if not is_loopback(host):
        raise InvalidArgument(
            f"an address other than loopback needs TLS, which this version does not have, got {address!r}"
        )


def _staged(
    options: ServerOptions,
    in_flight: InFlight,
    metrics: MetricsServer,
    authenticator: Authenticator,
    policy: Policy,
    request_log: RequestLog,
) -> tuple[StagedMethods, Intake]:
    access_log = AccessLog()
    refusals = AdmissionMetrics(metrics.registry)
    admission = Admission(options.limits, refusals)
    stages = (
        in_flight.stage,
        request_id_stage,
        *((trace_stage,) if tracing.is_on() else ()),
        metrics_stage(metrics.calls),
        access_log.stage,
        error_stage(refusals),
        auth_stage(authenticator, policy),
        about_stage,
        admission.stage,
        request_stage,
    )
    shed = Shedding(authenticator, admission, metrics.calls, access_log)
    return StagedMethods(stages, Idempotency(request_log).answer, shed), admission.intake


async def _stop(server: aio.Server, in_flight: InFlight, grace_seconds: float) -> None:
    in_flight.interrupt_streams()
    stopping = asyncio.ensure_future(server.stop(grace_seconds + _FAREWELL_SECONDS))
    await asyncio.wait([stopping], timeout=grace_seconds)
    in_flight.interrupt_all()
    await stopping


class _Methods:
    """What generated functions add services to, in place of a server: it knows each method, and that each has a policy.

    gRPC is told of the methods of `_OWN_LANES` alone. It waits for the next call of each of these by itself, so that
    they pass those who stand in the one queue of all others; and for each call of any it hangs a callback on every one
    of these waits and takes it off again, which makes many of them dear.
    """

    def __init__(self, staged: StagedMethods, server: aio.Server) -> None:
        self._staged = staged
        self._server = server
        self._types: dict[str, CallType] = {}
        self._num_services = 0
        self._num_told = 0

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._num_services += len(handlers)

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        self._num_told += 1
        staged = {}
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self._types[method] = call_type(handler)
            staged[name] = self._staged.add(method, handler)
        if service in _OWN_LANES:
            self._server.add_registered_method_handlers(service, staged)

    def require_policies(self, policy: Policy) -> None:
        """Raise AssertionError for a method without a policy, and for a service that does not tell its methods."""
        without = sorted(
            method for method in self._types if method not in policy and not method.startswith(HEALTH_SERVICE)
        )
        if without or self._num_told != self._num_services:
            raise AssertionError(
                f"every method must have a policy, without one are {without}; of {self._num_services} services "
                f"{self._num_told} tell their methods"
            )

    def type_of(self, method: str) -> CallType:
        assert method in self._types, f"the policy names {method}, which no servicer has"
        return self._types[method]


def require_free(address: str) -> None:
    """Raise FailedPrecondition where an address is another process's, which gRPC would tell in its own words.

    Also for who has something to do before it serves: where its port is taken, another service may be at it. Raises
    InvalidArgument as `check_loopback` does.
    """
    check_loopback(address)
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot serve on {address} ({error.strerror}): is the port taken?"
        ) from error


def _bind(server: aio.Server, address: str) -> int:
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot serve on {address}: is the port taken?") from error
