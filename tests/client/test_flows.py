"""Calls: retries, request ids, deadlines, errors, paging; on both stacks."""

import time
import uuid
from typing import Any

import grpc
import pytest

from luthier.client import AsyncClient, Client, ClientConfig, RetryPolicy
from luthier.errors import (
    DeadlineExceeded,
    InvalidArgument,
    LuthierError,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from luthier.v1.data_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    ListDatasetsResponse,
)
from luthier.v1.dataset_pb2 import Dataset, DatasetSource, DatasetVersion
from luthier.v1.upload_pb2 import Upload


def test_call_fills_a_request_id_that_its_retries_keep(services: Any, client: Client) -> None:
    seen: list[str] = []

    def create(request: Any, context: grpc.ServicerContext) -> Dataset:
        seen.append(request.request_id)
        if len(seen) < 3:
            services.refuse(context, grpc.StatusCode.UNAVAILABLE, "restarting", reason="SHUTTING_DOWN")
        return Dataset(name=f"{request.parent}/datasets/{request.dataset_id}")

    services.answers["CreateDataset"] = create
    assert client.datasets.create("a").name == "projects/default/datasets/a"
    client.datasets.create("b")
    assert len(seen) == 4
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert uuid.UUID(seen[0]).version == 4


def test_datasets_are_created_from_an_id_or_a_message(services: Any, client: Client) -> None:
    seen: list[Any] = []

    def create(request: CreateDatasetRequest, context: grpc.ServicerContext) -> Dataset:
        seen.append(request)
        return request.dataset

    services.answers["CreateDataset"] = create
    wanted = Dataset(display_name="A", labels={"team": "a", "kind": "x"})
    client.datasets.create("a", labels={"team": "b"})
    client.datasets.create(dataset_id="b")
    client.datasets.create(wanted, dataset_id="c", labels={"team": "b"})
    assert [(one.dataset_id, one.dataset.display_name, dict(one.dataset.labels)) for one in seen] == [
        ("a", "", {"team": "b"}),
        ("b", "", {}),
        ("c", "A", {"team": "b", "kind": "x"}),
    ]
    assert dict(wanted.labels) == {"team": "a", "kind": "x"}
    with pytest.raises(InvalidArgument, match="dataset_id: must be given once, got 'a' and 'b'"):
        client.datasets.create("a", dataset_id="b")


def test_versions_are_created_from_uploads_or_a_message(services: Any, client: Client) -> None:
    seen: list[DatasetVersion] = []

    def create(request: CreateDatasetVersionRequest, context: grpc.ServicerContext) -> DatasetVersion:
        seen.append(request.dataset_version)
        return request.dataset_version

    services.answers["CreateDatasetVersion"] = create
    wanted = DatasetVersion(sources=[DatasetSource(upload="u")], labels={"team": "a"})
    client.datasets.create_version("a", settings=wanted)
    client.datasets.create_version("a", [Upload(name="projects/default/uploads/v")], settings=wanted)
    assert [(one.sources[0].upload, dict(one.labels)) for one in seen] == [
        ("projects/default/uploads/u", {"team": "a"}),
        ("projects/default/uploads/v", {"team": "a"}),
    ]
    assert wanted.sources[0].upload == "u"


async def test_async_call_fills_a_request_id_that_its_retries_keep(
    services: Any, async_client: AsyncClient
) -> None:
    seen: list[str] = []

    def create(request: Any, context: grpc.ServicerContext) -> Dataset:
        seen.append(request.request_id)
        if len(seen) < 3:
            services.refuse(context, grpc.StatusCode.UNAVAILABLE, "restarting", reason="SHUTTING_DOWN")
        return Dataset(name=f"{request.parent}/datasets/{request.dataset_id}")

    services.answers["CreateDataset"] = create
    assert (await async_client.datasets.create("a")).name == "projects/default/datasets/a"
    assert len(set(seen)) == 1
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND", NotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", ResourceExhausted),
        (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID", Unauthenticated),
        (grpc.StatusCode.UNKNOWN, "", LuthierError),
    ],
)
def test_call_does_not_repeat_what_will_not_succeed(
    services: Any, client: Client, code: grpc.StatusCode, reason: str, kind: type[LuthierError]
) -> None:
    def get(request: Any, context: grpc.ServicerContext) -> None:
        services.refuse(context, code, "no", reason=reason)

    services.answers["GetDataset"] = get
    with pytest.raises(kind) as caught:
        client.datasets.get("a")
    assert type(caught.value) is kind
    assert services.calls["GetDataset"] == 1


def test_call_waits_as_long_as_an_exhausted_service_says(services: Any, client: Client) -> None:
    times: list[float] = []

    def get(request: Any, context: grpc.ServicerContext) -> Dataset:
        times.append(time.monotonic())
        if len(times) == 1:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            services.refuse(context, code, "full", reason="OVERLOADED", retry_after_seconds=0.3)
        return Dataset(name=request.name)

    services.answers["GetDataset"] = get
    client.datasets.get("a")
    assert times[1] - times[0] >= 0.29


def test_call_tells_of_a_full_disk_at_once(services: Any, client: Client) -> None:
    def get(request: Any, context: grpc.ServicerContext) -> None:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        services.refuse(context, code, "the disk is full", reason="DISK_FULL", retry_after_seconds=30.0)

    services.answers["GetDataset"] = get
    with pytest.raises(ResourceExhausted, match="the disk is full") as caught:
        client.datasets.get("a")
    assert caught.value.retry_after_seconds == 30.0
    assert services.calls["GetDataset"] == 1


def test_call_gives_up_when_the_retry_deadline_is_over(services: Any, config: ClientConfig) -> None:
    services.stop()
    policy = RetryPolicy(initial_seconds=0.05, max_seconds=0.1, deadline_seconds=0.5)
    impatient = ClientConfig(api_key="k", data_address=config.data_address, retry=policy)
    began = time.monotonic()
    with Client(impatient) as client, pytest.raises(Unavailable, match="cannot be reached"):
        client.datasets.get("a")
    assert 0.3 < time.monotonic() - began < 2.0


def test_call_outlives_a_restart_of_the_service(services: Any, client: Client) -> None:
    services.answers["GetDataset"] = lambda request, context: Dataset(name=request.name)
    client.datasets.get("a")
    services.stop()
    services.start()
    assert client.datasets.get("b").name == "projects/default/datasets/b"


def test_call_has_a_deadline(services: Any, config: ClientConfig) -> None:
    def get(request: Any, context: grpc.ServicerContext) -> Dataset:
        time.sleep(0.5)
        return Dataset()

    services.answers["GetDataset"] = get
    hasty = ClientConfig(api_key="k", data_address=config.data_address, timeout_seconds=0.1)
    with Client(hasty) as client, pytest.raises(DeadlineExceeded):
        client.datasets.get("a")
    assert services.calls["GetDataset"] == 1


async def test_both_stacks_raise_the_error_that_the_service_raised(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    def create(request: Any, context: grpc.ServicerContext) -> None:
        services.refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            "dataset_id: must match [a-z][a-z0-9-]{0,62}, got 'A'",
            reason="INVALID_FIELD",
            metadata={"request_id": "r-1", "value": "A"},
            violations=(("dataset_id", "must match [a-z][a-z0-9-]{0,62}, got 'A'"),),
            retry_after_seconds=1.5,
        )

    services.answers["CreateDataset"] = create
    with pytest.raises(InvalidArgument) as of_sync:
        client.datasets.create("A")
    with pytest.raises(InvalidArgument) as of_async:
        await async_client.datasets.create("A")
    for error in (of_sync.value, of_async.value):
        assert error.message == "dataset_id: must match [a-z][a-z0-9-]{0,62}, got 'A'"
        assert error.reason == "INVALID_FIELD"
        assert error.metadata == {"request_id": "r-1", "value": "A"}
        assert [violation.field for violation in error.violations] == ["dataset_id"]
        assert error.retry_after_seconds == 1.5
        assert error.metadata["request_id"] == "r-1"


def test_call_reads_an_error_whose_details_are_not_a_status(services: Any, client: Client) -> None:
    def get(request: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"), ("x-request-id", "r-2")))
        context.abort(grpc.StatusCode.NOT_FOUND, "there is none")

    services.answers["GetDataset"] = get
    with pytest.raises(NotFound, match="there is none") as caught:
        client.datasets.get("a")
    assert caught.value.metadata["request_id"] == "r-2"


def test_call_sends_the_api_key(services: Any, client: Client) -> None:
    services.answers["GetDataset"] = lambda request, context: Dataset(name=request.name)
    client.datasets.get("a")
    assert services.metadata["GetDataset"]["authorization"] == "Bearer test-key"


def _two_pages(request: Any, context: grpc.ServicerContext) -> ListDatasetsResponse:
    if request.page_token == "":
        assert request.filter == 'labels.team = "a"'
        return ListDatasetsResponse(datasets=[Dataset(name="a"), Dataset(name="b")], next_page_token="2")
    return ListDatasetsResponse(datasets=[Dataset(name="c")])


async def test_list_goes_through_all_pages(services: Any, client: Client, async_client: AsyncClient) -> None:
    services.answers["ListDatasets"] = _two_pages
    listed = client.datasets.list(filter='labels.team = "a"')
    assert [dataset.name for dataset in listed] == ["a", "b", "c"]
    async_listed = async_client.datasets.list(filter='labels.team = "a"')
    assert [dataset.name async for dataset in async_listed] == ["a", "b", "c"]


def test_list_asks_for_a_page_only_when_it_is_needed(services: Any, client: Client) -> None:
    services.answers["ListDatasets"] = _two_pages
    with client.datasets.list(filter='labels.team = "a"') as listed:
        assert next(listed).name == "a"
        assert services.calls["ListDatasets"] == 1
    assert list(listed) == []
