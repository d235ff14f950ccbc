"""A real server with a service of plain messages, and a log of requests in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from luthier.runtime.auth import Authenticator, TaskTokens
from luthier.runtime.granted_keys import GrantedKey
from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.policies import Policy, Rule
from luthier.runtime.server import Registration, Running, ServerOptions, serving
from luthier.v1 import data_service_pb2, dataset_pb2
from luthier.worker.v1 import worker_service_pb2

SERVICE = "test.v1.EchoService"
WORKER_SERVICE = "luthier.worker.v1.WorkerService"
Create = data_service_pb2.CreateDatasetRequest


class MemoryRequestLog:
    """A request log that forgets when the unit of work fails."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], tuple[str, bytes]] = {}

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[None]:
        before = dict(self.rows)
        try:
            yield
        except BaseException:
            self.rows = before
            raise

    async def find(self, principal: str, method: str, request_id: str) -> tuple[str, bytes] | None:
        return self.rows.get((principal, method, request_id))

    async def remember(
        self, principal: str, method: str, request_id: str, fingerprint: str, response_bytes: bytes
    ) -> None:
        self.rows[principal, method, request_id] = (fingerprint, response_bytes)


class Echo:
    """Answers Create with a counted dataset; `behave` runs first."""

    def __init__(self) -> None:
        self.calls = 0
        self.streams = 0
        self.closed = asyncio.Event()
        self.behave: Callable[[], Any] = lambda: None

    async def create(self, request: Any, context: Any) -> dataset_pb2.Dataset:
        outcome = self.behave()
        if asyncio.iscoroutine(outcome):
            await outcome
        self.calls += 1
        return dataset_pb2.Dataset(name=request.parent, uid=str(self.calls))

    async def stream(self, request: Any, context: Any) -> AsyncIterator[dataset_pb2.Dataset]:
        number = 0
        self.streams += 1
        try:
            while True:
                number += 1
                yield dataset_pb2.Dataset(uid=str(number))
                await asyncio.sleep(0.01)
        finally:
            self.streams -= 1
            self.closed.set()


def add_echo(echo: Echo, server: aio.Server, request_type: Any = Create) -> None:
    handlers = {
        "Create": grpc.unary_unary_rpc_method_handler(
            echo.create,
            request_deserializer=request_type.FromString,
            response_serializer=dataset_pb2.Dataset.SerializeToString,
        ),
        "Stream": grpc.unary_stream_rpc_method_handler(
            echo.stream,
            request_deserializer=Create.FromString,
            response_serializer=dataset_pb2.Dataset.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


def add_heartbeat(_: object, server: aio.Server) -> None:
    """A method of the workers' service that answers whoever calls."""

    async def beat(request: Any, context: Any) -> worker_service_pb2.HeartbeatResponse:
        return worker_service_pb2.HeartbeatResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        beat,
        request_deserializer=worker_service_pb2.HeartbeatRequest.FromString,
        response_serializer=worker_service_pb2.HeartbeatResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(WORKER_SERVICE, {"Heartbeat": handler}),)
    )
    server.add_registered_method_handlers(WORKER_SERVICE, {"Heartbeat": handler})


class Site:
    """A served Echo and calls to it."""

    def __init__(
        self, running: Running, echo: Echo, keys: Keys, log: MemoryRequestLog, wire: aio.Channel
    ) -> None:
        self.running = running
        self.echo = echo
        self.keys = keys
        self.log = log
        self.wire = wire

    def metadata(self, secret: str | None = None) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {secret or self.keys.api_key}"),)

    def create(self, request: Any | None = None, **options: Any) -> Any:
        """Call Create with the API key unless the options say otherwise."""
        call = self.wire.unary_unary(
            f"/{SERVICE}/Create",
            request_serializer=Create.SerializeToString,
            response_deserializer=dataset_pb2.Dataset.FromString,
        )
        options.setdefault("metadata", self.metadata())
        options.setdefault("timeout", 10)
        return call(request or Create(parent="projects/p"), **options)

    def stream(self) -> Any:
        call = self.wire.unary_stream(
            f"/{SERVICE}/Stream",
            request_serializer=Create.SerializeToString,
            response_deserializer=dataset_pb2.Dataset.FromString,
        )
        return call(Create(parent="projects/p"), metadata=self.metadata(), timeout=30)


WORKER_POLICY: Policy = {
    f"/{WORKER_SERVICE}/Heartbeat": Rule(roles=frozenset({"worker"}), subjectless="tests ask about nothing")
}
POLICY: Policy = {
    f"/{SERVICE}/Create": Rule(roles=frozenset({"writer", "task"}), subject="parent"),
    f"/{SERVICE}/Stream": Rule(roles=frozenset({"reader"}), subject="parent"),
}


@asynccontextmanager
async def serve(
    home: Path,
    *,
    projects: tuple[str, ...] | None = None,
    request_type: Any = Create,
    with_worker_service: bool = False,
    granted: tuple[GrantedKey, ...] = (),
    **options: Any,
) -> AsyncIterator[Site]:
    """Serve an Echo of some projects, of all by default, whose Create takes messages of a type."""
    keys = read_or_create_keys(home)
    echo, log = Echo(), MemoryRequestLog()
    add = partial(add_echo, request_type=request_type)
    registrations = [Registration(add=add, servicer=echo, name=SERVICE)]
    if with_worker_service:
        registrations.append(Registration(add=add_heartbeat, servicer=None, name=WORKER_SERVICE))
    async with (
        serving(
            ServerOptions(address="127.0.0.1:0", drain_seconds=0.0, **options),
            registrations,
            authenticator=Authenticator(
                keys, TaskTokens(keys.token_secret), projects=projects, granted=granted
            ),
            policy={**POLICY, **(WORKER_POLICY if with_worker_service else {})},
            request_log=log,
            metrics=MetricsServer("127.0.0.1:0"),
        ) as running,
        aio.insecure_channel(f"127.0.0.1:{running.port}") as wire,
    ):
        yield Site(running, echo, keys, log, wire)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served
