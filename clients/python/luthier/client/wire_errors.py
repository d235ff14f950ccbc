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
    request_id = dict(call.trailing_metadata() or ()).get(_REQUEST_ID_KEY)
    has_id = isinstance(request_id, str) and request_id
    return status_to_error(status, {"request_id": str(request_id)} if has_id else {})
