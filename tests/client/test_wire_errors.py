"""Errors from the wire: what a service or a proxy sent, however mangled, becomes an error of the tree."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.client import Client
from luthier.errors import NotFound
from luthier.errors.status import status_to_failure

_PREFIX = "type.googleapis.com/google.rpc."


def _status(*details: any_pb2.Any) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="it is gone")
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="RESOURCE_EXPIRED", metadata={"name": "x"}))
    status.details.extend([info, *details])
    return status


@pytest.mark.parametrize("kind", ["BadRequest", "PreconditionFailure", "RetryInfo", "Unheard"])
def test_details_that_cannot_be_read_are_as_if_not_sent(services: Any, client: Client, kind: str) -> None:
    packed = _status(any_pb2.Any(type_url=_PREFIX + kind, value=b"\xff\xff")).SerializeToString()

    def refuse(request: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", packed),))
        context.abort(grpc.StatusCode.NOT_FOUND, "it is gone")

    services.answers["GetModel"] = refuse
    with pytest.raises(NotFound, match="it is gone") as raised:
        client.models.get("x")
    assert (raised.value.reason, dict(raised.value.metadata)) == ("RESOURCE_EXPIRED", {"name": "x"})
    assert (raised.value.violations, raised.value.retry_after_seconds) == ((), None)


@pytest.mark.parametrize(("seconds", "read"), [(10**15, 1e15), (-5, 0.0), (3, 3.0)])
def test_any_retry_delay_is_a_number_of_seconds(seconds: int, read: float) -> None:
    retry = any_pb2.Any()
    info = error_details_pb2.RetryInfo()
    info.retry_delay.seconds = seconds
    retry.Pack(info)
    failure = status_to_failure(_status(retry))
    assert (failure.code, failure.reason, failure.retry_after_seconds) == (
        "NOT_FOUND",
        "RESOURCE_EXPIRED",
        read,
    )
