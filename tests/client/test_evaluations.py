"""Generation: what is sent, when it is tried again, how it is stopped."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from luthier.client import AsyncClient, Client
from luthier.errors import Unavailable
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
from luthier.v1.evaluation_service_pb2 import GenerateTextRequest, GenerateTextResponse


async def test_generate_sends_a_prompt_or_messages(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    seen: list[Any] = []

    def generate(request: Any, context: grpc.ServicerContext) -> Iterator[GenerateTextResponse]:
        seen.append(request)
        yield GenerateTextResponse(text="a")
        yield GenerateTextResponse(text="b", finish_reason=FINISH_REASON_STOP)

    services.answers["GenerateText"] = generate
    assert [piece.text for piece in client.generate("m", "Once", temperature=0.5, seed=3)] == ["a", "b"]
    messages = [ChatMessage(role="user", content="hello")]
    assert [piece.text async for piece in async_client.generate("m", messages)] == ["a", "b"]
    assert (seen[0].model, seen[0].prompt, seen[0].temperature, seen[0].seed) == (
        "projects/default/models/m",
        "Once",
        0.5,
        3,
    )
    assert list(seen[1].conversation.messages) == messages


async def test_generate_takes_a_whole_request(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    seen: list[Any] = []

    def generate(request: Any, context: grpc.ServicerContext) -> Iterator[GenerateTextResponse]:
        seen.append(request)
        yield GenerateTextResponse(text="a", finish_reason=FINISH_REASON_STOP)

    services.answers["GenerateText"] = generate
    wanted = GenerateTextRequest(model="m", prompt="Once", top_p=0.5, seed=3)
    assert [piece.text for piece in client.generate(wanted)] == ["a"]
    assert [piece.text async for piece in async_client.generate(wanted, "Twice", seed=4)] == ["a"]
    full = "projects/default/models/m"
    assert seen[0] == GenerateTextRequest(model=full, prompt="Once", top_p=0.5, seed=3)
    assert seen[1] == GenerateTextRequest(model=full, prompt="Twice", top_p=0.5, seed=4)
    assert wanted == GenerateTextRequest(model="m", prompt="Once", top_p=0.5, seed=3)


def test_generate_is_tried_again_only_while_nothing_has_come(services: Any, client: Client) -> None:
    breaks_after = [0, 1]

    def generate(request: Any, context: grpc.ServicerContext) -> Iterator[GenerateTextResponse]:
        for _ in range(breaks_after.pop(0)):
            yield GenerateTextResponse(text="a")
        services.refuse(context, grpc.StatusCode.UNAVAILABLE, "away", reason="SHUTTING_DOWN")

    services.answers["GenerateText"] = generate
    with client.generate("m", "Once") as pieces:
        assert next(pieces).text == "a"
        with pytest.raises(Unavailable):
            next(pieces)
    assert services.calls["GenerateText"] == 2


def _endless(services: Any) -> threading.Event:
    ended = threading.Event()

    def generate(request: Any, context: grpc.ServicerContext) -> Iterator[GenerateTextResponse]:
        context.add_callback(ended.set)
        while not ended.wait(0.01):
            yield GenerateTextResponse(text="a")

    services.answers["GenerateText"] = generate
    return ended


def test_closing_the_stream_stops_the_generation(services: Any, client: Client) -> None:
    ended = _endless(services)
    with client.generate("m", "Once") as pieces:
        assert next(pieces).text == "a"
        assert not ended.is_set()
    assert ended.wait(5)
    assert list(pieces) == []


def test_a_dropped_stream_stops_the_generation(services: Any, client: Client) -> None:
    ended = _endless(services)
    for piece in client.generate("m", "Once"):
        assert piece.text == "a"
        break
    assert ended.wait(5)


async def test_cancelling_the_task_stops_the_generation(services: Any, async_client: AsyncClient) -> None:
    ended = _endless(services)
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in async_client.generate("m", "Once"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ended.wait, 5)
