"""From what gRPC raises to the error tree of `luthier.errors`."""

from typing import cast

import grpc

from luthier.errors import LuthierError
from luthier.errors.status import FailedCall, status_of_call, status_to_error

_REQUEST_ID_KEY = "x-request-id"


def from_rpc_error(error: grpc.RpcError) -> LuthierError:
    """Return the error that the service raised, or that gRPC raised in its stead.

    A status without details, as gRPC itself and proxies send, becomes the class of its code with that class's
    default reason. The metadata has the id of the request, where the service told it.
    """
    call = cast(FailedCall, error)
    status = status_of_call(call)
    if call.code() is grpc.StatusCode.UNAVAILABLE and not status.details:
        status.message = f"the service cannot be reached: {status.message}"
    request_id = _request_id(call)
    return status_to_error(status, {"request_id": request_id} if request_id else {})


def has_request_id(error: grpc.RpcError) -> bool:
    """Tell whether a service of ours answered: gRPC itself, proxies and strangers give calls no id."""
    return bool(_request_id(cast(FailedCall, error)))


def _request_id(call: FailedCall) -> str:
    request_id = dict(call.trailing_metadata() or ()).get(_REQUEST_ID_KEY)
    return request_id if isinstance(request_id, str) else ""
