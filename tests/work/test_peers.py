"""Calls of one service to another: what fails by our own credential, or by the other's absence, is never the user's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tests.stores import open_database

from luthier.data.peers import ModelPeer
from luthier.errors import LuthierError, NotFound, Reason, Unavailable
from luthier.evaluation.peers import GrpcPeers
from luthier.runtime.auth import Authenticator, TaskTokens
from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.policies import policy_for
from luthier.runtime.server import Registration, ServerOptions, serving
from luthier.training.peers import DataRenderings
from luthier.v1 import data_service_pb2, data_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from luthier.work.keeping import ANSWER_KEEP_SECONDS
from luthier.work.peers import aio_channel, bearer, channel
from luthier.work.requests import SqlRequestLog
from luthier.work.retry import retrying

VERSION = "projects/p/datasets/d/versions/v"
RENDERING = f"{VERSION}/renderings/r"
MODEL = "projects/p/models/m"


class Data(data_service_pb2_grpc.DataServiceServicer):
    """Has nothing."""

    async def GetDatasetVersion(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound(f"{request.name} does not exist")

    async def GetRendering(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound(f"{request.name} does not exist")

    async def ReadRendering(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound(f"{request.name} does not exist")
        yield


class Models(model_service_pb2_grpc.ModelServiceServicer):
    """Has nothing."""

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound(f"{request.name} does not exist")


REGISTRATIONS: tuple[tuple[Callable[[Any, Any], None], Callable[[], Any]], ...] = (
    (data_service_pb2_grpc.add_DataServiceServicer_to_server, Data),
    (model_service_pb2_grpc.add_ModelServiceServicer_to_server, Models),
)


def calls(connected: grpc.aio.Channel, tokens: TaskTokens) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call that a service makes to another one while a user waits, by name."""
    evaluation = GrpcPeers(connected, connected, tokens)
    training = DataRenderings(connected, tokens, "here")
    data = ModelPeer(connected, tokens)
    return {
        "evaluation version": lambda: evaluation.version(VERSION),
        "evaluation model": lambda: evaluation.model(MODEL),
        "training rendering": lambda: training.get(RENDERING),
        "training lengths": lambda: training.lengths(RENDERING),
        "data model": lambda: data.get(MODEL),
    }


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[tuple[str, Keys]]:
    """The address and the keys of a server with the Data and the Model service, open to tasks."""
    keys = read_or_create_keys(tmp_path / "theirs")
    database = open_database(tmp_path / "peer")
    services = (
        data_service_pb2.DESCRIPTOR.services_by_name["DataService"],
        model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        running = await stack.enter_async_context(
            serving(
                ServerOptions(address="127.0.0.1:0", drain_seconds=0.0),
                [
                    Registration(add=add, servicer=servicer(), name=service.full_name)
                    for (add, servicer), service in zip(REGISTRATIONS, services, strict=True)
                ],
                authenticator=Authenticator(keys),
                policy={**policy_for(services[0], "task"), **policy_for(services[1], "task")},
                request_log=SqlRequestLog(database, ANSWER_KEEP_SECONDS),
                metrics=MetricsServer("127.0.0.1:0"),
            )
        )
        yield f"127.0.0.1:{running.port}", keys


async def failures(address: str, tokens: TaskTokens) -> dict[str, LuthierError]:
    """What every call fails with."""
    found = {}
    async with aio_channel(address) as connected:
        for name, call in calls(connected, tokens).items():
            with pytest.raises(LuthierError) as caught:
                await call()
            found[name] = caught.value
    return found


async def test_a_credential_that_a_peer_refuses_is_not_the_users(peer: tuple[str, Keys]) -> None:
    address, keys = peer
    late = TaskTokens(keys.token_secret, clock=lambda: 1_000_000.0)
    other = TaskTokens("another secret of another home")
    for tokens, why in ((late, "has expired"), (other, "is not one of ours")):
        for name, error in (await failures(address, tokens)).items():
            assert isinstance(error, Unavailable), (name, error)
            assert error.reason == Reason.PEER_REFUSED, name
            assert why in error.message, name
            assert "refuses this process's own credential" in error.message, name
            assert error.retry_after_seconds is not None, name


async def test_what_a_peer_says_of_the_request_itself_stays_as_it_is(peer: tuple[str, Keys]) -> None:
    address, keys = peer
    for name, error in (await failures(address, TaskTokens(keys.token_secret))).items():
        assert error.code == "NOT_FOUND", name


async def test_a_peer_that_is_away_is_unavailable_to_everyone(peer: tuple[str, Keys]) -> None:
    _, keys = peer
    for name, error in (await failures("127.0.0.1:1", TaskTokens(keys.token_secret))).items():
        assert isinstance(error, Unavailable), name
        assert error.reason == Reason.SERVICE_UNAVAILABLE, name
        assert "must answer, it is away" in error.message, name
        assert error.retry_after_seconds is not None, name


async def test_a_workers_task_whose_credential_is_refused_is_to_be_tried_again(
    peer: tuple[str, Keys],
) -> None:
    address, keys = peer
    token = TaskTokens(keys.token_secret, clock=lambda: 1_000_000.0).mint("p", (MODEL,), 1, "t", 60.0)

    def fetch() -> None:
        with channel(address) as connected:
            stub = model_service_pb2_grpc.ModelServiceStub(connected)
            request = model_service_pb2.ListModelFilesRequest(parent=MODEL)
            retrying(lambda: stub.ListModelFiles(request, metadata=bearer(token), timeout=10))

    with pytest.raises(Unavailable) as caught:
        await asyncio.to_thread(fetch)
    assert caught.value.reason == Reason.PEER_REFUSED
