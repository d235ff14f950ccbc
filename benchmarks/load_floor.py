"""The least that a refusal costs: a gRPC server in Python that ends each call at once, in the words of ours.

It looks at nothing: no key, no slot, no counter, no log. What it cannot keep up with, no stage before it could.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from luthier.runtime.admission import overloaded
from luthier.runtime.status import to_trailer

_ERROR = overloaded("reads", 0.5)
_TRAILERS = (to_trailer(_ERROR),)


class _Refusing(grpc.GenericRpcHandler):
    """Refuses every method."""

    def __init__(self) -> None:
        self._handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(self._refuse)

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return self._handler

    async def _refuse(self, _: bytes, context: aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _ERROR.message, _TRAILERS)


@asynccontextmanager
async def floor() -> AsyncIterator[str]:
    """Run it in a process of its own; yields its address."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.terminate()
        await process.wait()


async def main() -> None:
    """Serve until the process is ended; print the port."""
    server = aio.server()
    server.add_generic_rpc_handlers((_Refusing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
