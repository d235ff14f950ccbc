"""Version and time are told to who has a key and asks."""

from __future__ import annotations

import time
from importlib.metadata import version

from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.runtime.conftest import Site
from tests.runtime.test_server import refusal

from luthier import errors


async def test_version_and_time_are_told_to_who_asks(site: Site) -> None:
    asking = ("luthier-about", "1")
    call = site.create(metadata=(*site.metadata(), asking))
    began = time.time()
    await call
    told = dict(await call.trailing_metadata())
    assert told["luthier-version"] == version("luthier")
    assert began - 1.0 <= float(told["luthier-time"]) <= time.time()
    assert told["x-request-id"]
    quiet = site.create(metadata=site.metadata())
    await quiet
    assert not {"luthier-version", "luthier-time"} & dict(await quiet.trailing_metadata()).keys()


async def test_version_and_time_are_told_with_a_refusal_and_to_nobody_without_a_key(site: Site) -> None:
    def fail() -> None:
        raise errors.NotFound("no such thing")

    site.echo.behave = fail
    asking = ("luthier-about", "1")
    refused, _ = await refusal(site.create(metadata=(*site.metadata(), asking)))
    assert dict(refused.trailing_metadata())["luthier-version"] == version("luthier")
    stranger, _ = await refusal(site.create(metadata=(asking,)))
    assert not {"luthier-version", "luthier-time"} & dict(stranger.trailing_metadata()).keys()


async def test_a_check_of_health_which_needs_no_key_tells_nothing(site: Site) -> None:
    health = health_pb2_grpc.HealthStub(site.wire)
    asking = ("luthier-about", "1")
    for metadata in ((asking,), (asking, ("authorization", "Bearer wrong")), (*site.metadata(), asking)):
        checked = health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=10)
        assert (await checked).status == health_pb2.HealthCheckResponse.SERVING
        told = dict(await checked.trailing_metadata())
        assert told["x-request-id"]
        assert not {"luthier-version", "luthier-time"} & told.keys()
    unknown, _ = await refusal(
        health.Check(health_pb2.HealthCheckRequest(service="none"), metadata=(asking,), timeout=10)
    )
    assert not {"luthier-version", "luthier-time"} & dict(unknown.trailing_metadata()).keys()
