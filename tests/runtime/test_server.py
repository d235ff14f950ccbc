"""The server over a real port: errors, credentials, replay, metrics, health, draining."""

from __future__ import annotations

import asyncio
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.runtime.conftest import SERVICE, Site, serve

from luthier import errors
from luthier.errors import BY_CODE, FieldViolation, InvalidArgument
from luthier.runtime.auth import TaskTokens
from luthier.runtime.logs import JsonFormatter
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.server import check_loopback, of_families
from luthier.v1 import data_service_pb2

Create = data_service_pb2.CreateDatasetRequest


async def refusal(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error of a call, and its details by type."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == caught.value.code().value[0]
    found: dict[str, Any] = {"message": status.message}
    for detail in status.details:
        name = detail.TypeName().rsplit(".", 1)[-1]
        assert name not in found, "each kind of detail comes once"
        message = getattr(error_details_pb2, name)()
        detail.Unpack(message)
        found[name] = message
    return caught.value, found


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.code)
async def test_an_error_of_the_tree_comes_with_its_code_and_reason(
    site: Site, kind: type[errors.LuthierError]
) -> None:
    def fail() -> None:
        raise kind("rank must be in 1..512, got 0", metadata={"rank": "0"})

    site.echo.behave = fail
    error, details = await refusal(site.create())
    assert error.code() is grpc.StatusCode[kind.code]
    assert details["message"] == "rank must be in 1..512, got 0"
    info = details["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.default_reason, "luthier", {"rank": "0"})
    assert details["RequestInfo"].request_id


async def test_field_violations_and_retry_come_as_their_own_details(site: Site) -> None:
    def fail() -> None:
        violation = FieldViolation(field="job.lora.rank", description="must be in 1..512, got 0")
        raise InvalidArgument("bad", violations=(violation,), retry_after_seconds=1.5)

    site.echo.behave = fail
    _, details = await refusal(site.create())
    field = details["BadRequest"].field_violations[0]
    assert (field.field, field.description) == ("job.lora.rank", "must be in 1..512, got 0")
    assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 1.5


async def test_an_unforeseen_error_tells_nothing_but_the_request_id(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the secret inside")

    site.echo.behave = fail
    metadata = (*site.metadata(), ("x-request-id", "my-id"))
    error, details = await refusal(site.create(metadata=metadata))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in details["message"]
    assert "my-id" in details["message"]
    assert "the secret inside" in caplog.text


async def test_the_request_id_comes_back(site: Site) -> None:
    call = site.create(metadata=(*site.metadata(), ("x-request-id", "abc-1")))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "CREDENTIALS_MISSING"),
        ((("authorization", "Bearer lk_wrong"),), "CREDENTIALS_INVALID"),
        ((("authorization", "Basic abc"),), "CREDENTIALS_INVALID"),
        ((("authorization", "Bearer lt_e30.00"),), "CREDENTIALS_INVALID"),
    ],
)
async def test_no_key_no_call(site: Site, metadata: Any, reason: str) -> None:
    error, details = await refusal(site.create(metadata=metadata))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details["ErrorInfo"].reason == reason
    assert "wrong" not in details["message"]
    assert site.echo.calls == 0


async def test_a_kind_outside_the_policy_may_not_call(site: Site) -> None:
    error, details = await refusal(site.create(metadata=site.metadata(site.keys.worker_key)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details["ErrorInfo"].metadata["kind"] == "worker"


async def test_a_task_may_touch_only_what_its_token_names(site: Site) -> None:
    token = TaskTokens(site.keys.token_secret).mint("p", ("projects/p/datasets/d",), 1, "t", 60)
    below = Create(parent="projects/p/datasets/d/versions/v")
    assert (await site.create(below, metadata=site.metadata(token))).name == below.parent
    for parent in ("projects/p/datasets/d2", "projects/p", "p"):
        error, _ = await refusal(site.create(Create(parent=parent), metadata=site.metadata(token)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_same_request_id_returns_the_first_answer(site: Site) -> None:
    request = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    first = await site.create(request)
    assert await site.create(request) == first
    assert site.echo.calls == 1


async def test_concurrent_calls_with_one_request_id_run_once(site: Site) -> None:
    site.echo.behave = lambda: asyncio.sleep(0.05)
    request = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    answers = await asyncio.gather(*(site.create(request) for _ in range(5)))
    assert site.echo.calls == 1
    assert all(answer == answers[0] for answer in answers)


async def test_a_request_id_with_another_body_is_refused(site: Site) -> None:
    request = Create(parent="projects/p", request_id=str(uuid.uuid4()))
    await site.create(request)
    request.dataset_id = "other"
    error, details = await refusal(site.create(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "REQUEST_ID_REUSED"
    assert details["BadRequest"].field_violations[0].field == "request_id"


async def test_a_failed_call_is_not_remembered(site: Site) -> None:
    request = Create(parent="projects/p", request_id=str(uuid.uuid4()))

    def fail() -> None:
        raise errors.Unavailable("away")

    site.echo.behave = fail
    await refusal(site.create(request))
    site.echo.behave = lambda: None
    assert (await site.create(request)).uid == "1"


async def test_a_request_id_that_is_no_uuid_is_refused(site: Site) -> None:
    _, details = await refusal(site.create(Create(parent="projects/p", request_id="abc")))
    assert "must be a UUID" in details["message"]
    assert "'abc'" in details["message"]


async def test_metrics_count_calls_under_the_usual_names(site: Site) -> None:
    await site.create()
    url = f"http://127.0.0.1:{site.running.metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    labels = f'grpc_method="Create",grpc_service="{SERVICE}",grpc_type="unary"'
    assert f"grpc_server_started_total{{{labels}}} 1.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{labels}}} 1.0' in text
    assert f"grpc_server_msg_received_total{{{labels}}} 1.0" in text
    assert f"grpc_server_handling_seconds_count{{{labels}}} 1.0" in text
    assert "luthier_build_info{version=" in text


async def test_codes_are_spelt_as_go_spells_them(site: Site) -> None:
    await refusal(site.create(metadata=()))
    url = f"http://127.0.0.1:{site.running.metrics_port}/metrics"
    wanted, text = 'grpc_server_handled_total{grpc_code="Unauthenticated",grpc_method="Create"', ""
    # The caller has the refusal before it is counted.
    async with asyncio.timeout(20):
        while wanted not in text:
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/luthier.worker.v1.WorkerService/Heartbeat"]
)
async def test_health_and_workers_do_not_stand_behind_a_flood_of_other_calls(
    tmp_path: Path, method: str
) -> None:
    order: list[str] = []

    async def made(call: Any, name: str) -> None:
        await asyncio.wait([asyncio.ensure_future(call)])
        order.append(name)

    async with serve(tmp_path / "home", with_worker_service=True) as site:
        flood = [asyncio.create_task(made(site.create(), "other")) for _ in range(500)]
        await asyncio.sleep(0)
        call: Any = site.wire.unary_unary(method)
        ours = call(b"", metadata=site.metadata(site.keys.worker_key), timeout=10)
        await asyncio.gather(*flood, made(ours, "ours"))
    assert await ours.code() is grpc.StatusCode.OK
    assert order.index("ours") < 100


async def test_health_needs_no_key_and_knows_each_service(site: Site) -> None:
    stub = health_pb2_grpc.HealthStub(site.wire)
    for name in ("", SERVICE):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_stopping_lets_calls_end_and_sends_watchers_away(tmp_path: Path) -> None:
    served = serve(tmp_path / "home", grace_seconds=5.0)
    inside = await served.__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{inside.running.port}") as wire:
        site = Site(inside.running, inside.echo, inside.keys, inside.log, wire)
        site.echo.behave = lambda: asyncio.sleep(0.3)
        slow = asyncio.ensure_future(site.create())
        watched = site.stream()
        await watched.read()
        await asyncio.sleep(0.1)
        stop = asyncio.ensure_future(served.__aexit__(None, None, None))
        assert (await slow).uid == "1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(watched)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stop


async def drained(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def metrics_of(site: Site) -> str:
    url = f"http://127.0.0.1:{site.running.metrics_port}/metrics"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())


async def test_bytes_that_are_no_message_are_an_invalid_argument(site: Site) -> None:
    call: Any = site.wire.unary_unary(f"/{SERVICE}/Create")
    error, details = await refusal(call(b"\xff\xff\xff", metadata=site.metadata()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].metadata["method"] == f"/{SERVICE}/Create"
    assert "Dataset" not in details["message"], "what is inside is not told"
    error, _ = await refusal(call(b"\xff\xff\xff"))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, "who may not call learns nothing of the request"
    assert 'grpc_code="InvalidArgument"' in await metrics_of(site)


async def test_an_error_too_large_for_a_header_still_arrives(site: Site) -> None:
    def fail() -> None:
        raise InvalidArgument(
            "\N{GRINNING FACE}" * 2000,
            metadata={f"key{number}": "é" * 4000 for number in range(20)},
            violations=[FieldViolation(field="f" * 500, description="é" * 1000) for _ in range(100)],
            retry_after_seconds=1.0,
        )

    site.echo.behave = fail
    # gRPC drops metadata that is somewhat too large at random: once would prove little.
    for _ in range(30):
        error, details = await refusal(site.create())
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(details["BadRequest"].field_violations) >= 1
    assert details["ErrorInfo"].metadata["key0"].endswith("…")


async def test_a_call_past_its_deadline_is_counted_as_such(site: Site) -> None:
    site.echo.behave = lambda: asyncio.sleep(30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.create(timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await ended(site, "DeadlineExceeded")


async def test_a_call_that_its_caller_cancels_is_cancelled_inside(site: Site) -> None:
    seen: list[type[BaseException]] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        except BaseException as error:
            seen.append(type(error))
            raise

    site.echo.behave = wait
    call = site.create()
    await asyncio.sleep(0.1)
    call.cancel()
    await ended(site, "Canceled")
    assert seen == [asyncio.CancelledError]


async def ended(site: Site, code: str) -> None:
    async with asyncio.timeout(5):
        # Counted after the answer is on its way: nothing tells when.
        while f'grpc_code="{code}",grpc_method="Create"' not in await metrics_of(site):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_series_are_there_before_the_first_call_under_their_own_kind(site: Site) -> None:
    text = await metrics_of(site)
    for method, kind in (("Create", "unary"), ("Stream", "server_stream")):
        labels = f'grpc_method="{method}",grpc_service="{SERVICE}",grpc_type="{kind}"'
        assert f"grpc_server_started_total{{{labels}}} 0.0" in text
    assert 'grpc_method="Stream",grpc_service="test.v1.EchoService",grpc_type="unary"' not in text


async def test_a_stream_is_closed_at_once_when_its_caller_goes_away(site: Site) -> None:
    stream = site.stream()
    await stream.read()
    assert site.echo.streams == 1
    stream.cancel()
    async with asyncio.timeout(5):
        await site.echo.closed.wait()


async def test_a_call_that_outlasts_the_grace_is_told_to_come_again(tmp_path: Path) -> None:
    served = serve(tmp_path / "home", grace_seconds=0.3)
    inside = await served.__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{inside.running.port}") as wire:
        site = Site(inside.running, inside.echo, inside.keys, inside.log, wire)
        site.echo.behave = lambda: asyncio.sleep(30)
        stuck = asyncio.ensure_future(site.create())
        await asyncio.sleep(0.1)
        async with asyncio.timeout(3):
            await served.__aexit__(None, None, None)
        error, details = await refusal(stuck)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details["ErrorInfo"].reason == "SHUTTING_DOWN"
        assert details["RetryInfo"].retry_delay.seconds == 1


async def test_no_log_line_holds_a_credential(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a fault")

    caplog.set_level("DEBUG")
    caplog.handler.setFormatter(JsonFormatter())
    token = TaskTokens(site.keys.token_secret).mint("p", ("projects/p",), 1, "t", 60)
    await site.create(metadata=site.metadata(token))
    await refusal(site.create(metadata=(("authorization", "Bearer lk_wrong-secret"),)))
    site.echo.behave = fail
    await refusal(site.create())
    async with asyncio.timeout(10):  # a call's line is written when its answer has gone
        while '"principal": "key:' not in caplog.text:  # noqa: ASYNC110 - nothing tells of a line
            await asyncio.sleep(0.01)
    secrets = (site.keys.api_key, site.keys.worker_key, site.keys.token_secret, token, "wrong-secret")
    assert not [secret for secret in secrets if secret in caplog.text]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:7601", "[::1]:7601"])
def test_loopback_addresses_are_served(address: str) -> None:
    check_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:7601", "10.1.2.3:7601", "example.org:1", "7601", "127.0.0.1:x"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="got") as caught:
        check_loopback(address)
    assert repr(address) in caught.value.message


async def test_a_taken_metrics_port_is_told(site: Site) -> None:
    metrics = MetricsServer(f"127.0.0.1:{site.running.metrics_port}")
    with pytest.raises(errors.FailedPrecondition, match="is the port taken"):
        async with metrics.serving():
            pass


def test_every_method_of_a_service_is_of_one_of_its_families() -> None:
    service = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
    methods = {method.name: object() for method in service.methods}
    first, others = dict(list(methods.items())[:3]), dict(list(methods.items())[3:])

    def registered(*families: dict[str, object]) -> Any:
        return of_families(service, lambda *_: None, [SimpleNamespace(**one) for one in families])

    made = registered(first, others)
    assert made.name == "luthier.v1.DataService"
    assert vars(made.servicer) == methods
    with pytest.raises(AssertionError, match="must be of one family, it is of 0"):
        registered(first)
    with pytest.raises(AssertionError, match="must be of one family, it is of 2"):
        registered(first, others, first)
