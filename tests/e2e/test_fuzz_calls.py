"""The fuzz finds what it is there to find."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc import aio
from tests.e2e import fuzz_calls
from tests.e2e.conftest import SERVICES, described_methods
from tests.e2e.fuzz_calls import WAITING, Site, told
from tests.e2e.test_fuzz import OTHERS

from luthier.v1 import data_service_pb2

GET = data_service_pb2.DESCRIPTOR.services_by_name["DataService"].methods_by_name["GetDataset"]
READ = data_service_pb2.DESCRIPTOR.services_by_name["DataService"].methods_by_name["ReadRecords"]
WRITE = data_service_pb2.DESCRIPTOR.services_by_name["DataService"].methods_by_name["WriteUpload"]
WATCH = data_service_pb2.DESCRIPTOR.services_by_name["DataService"].methods_by_name["WatchRendering"]


@pytest.mark.parametrize("method", [GET, READ, WRITE, WATCH], ids=lambda method: str(method.name))
async def test_a_call_that_hangs_is_found(method: MethodDescriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one that waits for others."""
    monkeypatch.setattr(fuzz_calls, "ANSWER_SECONDS", 0.5)

    async def hang(request: Any, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def hang_in_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    server = aio.server()
    handlers: dict[MethodDescriptor, Any] = {
        GET: grpc.unary_unary_rpc_method_handler(hang),
        READ: grpc.unary_stream_rpc_method_handler(hang_in_stream),
        WRITE: grpc.stream_unary_rpc_method_handler(hang),
        WATCH: grpc.unary_stream_rpc_method_handler(hang_in_stream),
    }
    named = {one.name: handler for one, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("luthier.v1.DataService", named),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with aio.insecure_channel(address) as channel:
        with grpc.insecure_channel(address) as blocking:
            found = await told(Site(channel, blocking), method, [b""], ())
    await server.stop(None)
    assert found == (None if method is WATCH else "silence for 0.5 s")


def test_what_may_wait_is_there() -> None:
    methods = {method.name for service in SERVICES for method in described_methods(service)}
    assert methods | {one.name for one in OTHERS} >= WAITING
    assert not {
        one for one in WAITING if one.startswith(("Create", "Get", "List", "Delete", "Plan", "Update"))
    }
