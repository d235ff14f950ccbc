"""A real gRPC server whose answers are written by each test."""

import collections
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.client import AsyncClient, Client, ClientConfig, RetryPolicy
from luthier.client.cli import main
from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

API_KEY = "test-key"
UID = "0b9c1d7e-1111-4222-8333-444455556666"
SERVICES = (
    (data_service_pb2, data_service_pb2_grpc, "DataService"),
    (model_service_pb2, model_service_pb2_grpc, "ModelService"),
    (training_service_pb2, training_service_pb2_grpc, "TrainingService"),
    (evaluation_service_pb2, evaluation_service_pb2_grpc, "EvaluationService"),
)
Answer = Callable[[Any, grpc.ServicerContext], Any]


def refuse(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    metadata: dict[str, str] | None = None,
    violations: tuple[tuple[str, str], ...] = (),
    retry_after_seconds: float | None = None,
) -> None:
    """End the call as a Luthier service does: `google.rpc.Status` in the trailing metadata."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)

    def add(detail: Any) -> None:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)

    if reason:
        add(error_details_pb2.ErrorInfo(reason=reason, domain="luthier", metadata=metadata or {}))
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description, reason="INVALID_FIELD")
        add(bad)
    if retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_seconds * 1e9))
        add(retry)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


class FakeServices:
    """All four services on one port. Methods answer with what the test put into `answers`.

    `calls` counts what came in, by method; `metadata` keeps what was sent along with the last call of each.
    """

    refuse = staticmethod(refuse)

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        self.metadata: dict[str, dict[str, str | bytes]] = {}
        self.address = ""
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Serve; after `stop` on the same port as before."""
        server = grpc.server(ThreadPoolExecutor(max_workers=8))
        for messages, stubs, service in SERVICES:
            servicer = type(service, (), {})()
            for rpc in messages.DESCRIPTOR.services_by_name[service].methods:
                setattr(servicer, rpc.name, self._handler(rpc.name, streams=rpc.server_streaming))
            getattr(stubs, f"add_{service}Servicer_to_server")(servicer, server)
        port = server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        server.start()
        self._server = server

    def stop(self) -> None:
        """End at once: running calls see UNAVAILABLE."""
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None

    def _handler(self, name: str, *, streams: bool) -> Answer:
        def record(context: grpc.ServicerContext) -> Answer:
            self.calls[name] += 1
            self.metadata[name] = dict(context.invocation_metadata())
            if name not in self.answers:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the test does not answer {name}")
            return self.answers[name]

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            return record(context)(request, context)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from record(context)(request, context)

        return stream if streams else unary


def named(kind: Any) -> Answer:
    """An answer to every Get: a resource of the name that is asked for, and always the same uid."""
    return lambda request, context: kind(name=request.name, uid=UID)


@pytest.fixture
def services() -> Iterator[FakeServices]:
    fake = FakeServices()
    for kind in (DatasetVersion, Rendering, Model, FineTuningJob, Evaluation):
        fake.answers[f"Get{kind.DESCRIPTOR.name}"] = named(kind)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def config(services: FakeServices) -> ClientConfig:
    return ClientConfig(
        api_key=API_KEY,
        data_address=services.address,
        training_address=services.address,
        evaluation_address=services.address,
        timeout_seconds=5.0,
        retry=RetryPolicy(initial_seconds=0.01, max_seconds=0.05, deadline_seconds=5.0),
    )


@pytest.fixture
def client(config: ClientConfig) -> Iterator[Client]:
    with Client(config) as opened:
        yield opened


@pytest.fixture
async def async_client(config: ClientConfig) -> Any:
    async with AsyncClient(config) as opened:
        yield opened


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "api-key").write_text(f"{API_KEY}\n")
    return folder


def _wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    return _wait_until


@pytest.fixture
def arguments(services: Any, home: Path) -> list[str]:
    flags = [f"--{service}-address={services.address}" for service in ("data", "training", "evaluation")]
    return [f"--home={home}", *flags]


@pytest.fixture
def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in list(os.environ):
        if name.startswith("LUTHIER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")

    def invoke(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [*arguments, *words], input=stdin)

    return invoke
