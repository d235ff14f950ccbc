"""Calls of a fuzz, and what is wrong with their answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from tests.e2e.conftest import path_of

NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
# What gRPC itself answers, before any stage of ours: no method of this name, a message above 4 MiB.
BARE = {grpc.StatusCode.UNIMPLEMENTED}
WAITING = {
    *(
        "WatchDatasetVersion",
        "WatchRendering",
        "WatchEvaluation",
        "WatchModel",
        "WatchFineTuningJob",
        "Watch",
    ),
    *("ClaimTask", "TakeGenerations", "GenerateText", "GradeSamples"),
}
"""Methods that may wait for what others do: for an event, for work, for a worker, for a grader's address."""
WAIT_SECONDS = 0.4
ANSWER_SECONDS = 20.0
"""Within which every other method answers, also on a busy machine: a call that hangs is a wrong answer."""


@dataclass
class Site:
    """Two lines to one service, and the methods that did what they were asked at least once."""

    channel: aio.Channel
    blocking: grpc.Channel
    answered: set[str] = field(default_factory=set)


def problem_of(error: Any, method: MethodDescriptor) -> str | None:
    code, details = error.code(), error.details()
    if code in NEVER:
        return f"{code.name}: {details}"
    if code in BARE | {grpc.StatusCode.CANCELLED}:
        return None
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(packed)
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not infos:  # of this side: nothing came
        return None if method.name in WAITING else f"silence for {seconds_of(method):g} s"
    return None if len(infos) == 1 else f"{code.name} with {len(infos)} ErrorInfo: {details}"


def seconds_of(method: MethodDescriptor) -> float:
    return WAIT_SECONDS if method.name in WAITING else ANSWER_SECONDS


async def told(site: Site, method: MethodDescriptor, sent: list[bytes], metadata: Any) -> str | None:
    """Make a call, read at most five messages of what it streams; return what is wrong with the answer."""
    if method.client_streaming:
        # Not over grpc.aio, which says INTERNAL of its own when a call ends before all is written.
        return await asyncio.to_thread(told_of_stream, site.blocking, method, sent, metadata)
    channel: Any = site.channel
    open_ = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = open_(path_of(method))(sent[0], metadata=metadata, timeout=seconds_of(method))
    try:
        if not method.server_streaming:
            await call
            site.answered.add(method.name)
            return None
        for _ in range(5):
            if await call.read() is aio.EOF:
                break
            site.answered.add(method.name)
    except aio.AioRpcError as error:
        return problem_of(error, method)
    finally:
        call.cancel()
    return None


def told_of_stream(channel: Any, method: MethodDescriptor, sent: list[bytes], metadata: Any) -> str | None:
    seconds = seconds_of(method)
    try:
        if not method.server_streaming:
            channel.stream_unary(path_of(method))(iter(sent), metadata=metadata, timeout=seconds)
            return None
        answers = channel.stream_stream(path_of(method))
        for _ in answers(iter(sent), metadata=metadata, timeout=seconds):
            pass
    except grpc.RpcError as error:
        return problem_of(error, method)
    return None
