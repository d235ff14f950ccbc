"""Calling twice is safe: a request id is answered once, and every later call with it gets that answer (AIP-155)."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.auth import current_principal
from luthier.runtime.calls import Call

_KIND = "b1:"


class RequestLog(Protocol):
    """Where answers are kept, in the same database as the work that they answer for."""

    def unit_of_work(self) -> AbstractAsyncContextManager[None]:
        """Make what the block writes, and what `remember` stores in it, one transaction."""
        ...

    async def find(self, principal: str, method: str, request_id: str) -> tuple[str, bytes] | None:
        """Return the fingerprint and the response of an earlier call; None when there was none."""
        ...

    async def remember(
        self, principal: str, method: str, request_id: str, fingerprint: str, response_bytes: bytes
    ) -> None:
        """Keep a response."""
        ...


def fingerprint(request: Message) -> str:
    """Return what tells two bodies apart: the sha256 of a request's deterministic bytes less its request id.

    The bytes are written here, from a message that the door let in: without the service's own fields and without
    unknown ones, fields and map entries in order. What the caller's bytes looked like does not matter.
    """
    return _KIND + hashlib.sha256(_body(request).SerializeToString(deterministic=True)).hexdigest()


def _is_of(stored: str, request: Message) -> bool:
    if stored.startswith(_KIND):
        return stored == fingerprint(request)
    # Answers kept before fingerprints had a kind are compared as they were written, by JSON: some are there for as
    # long as answers are kept, which may be for ever.
    canonical = MessageToJson(_body(request), sort_keys=True, indent=None, ensure_ascii=True)
    return stored == hashlib.sha256(canonical.encode()).hexdigest()


def _body(request: Message) -> Message:
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    return copy


class Idempotency:
    """Answers unary calls whose request has a `request_id` field; every such call runs in a unit of work."""

    def __init__(self, log: RequestLog) -> None:
        self._log = log
        self._keyed = KeyedLocks()

    async def answer(self, call: Call, handle: Callable[[], Awaitable[Any]]) -> Any:
        """Return the handler's response, or the one that an earlier call with this request id got.

        Of calls that come together one runs and the others wait for its answer; when it fails, nothing is kept
        and the next one runs. Raises InvalidArgument when the id is no UUID, and REQUEST_ID_REUSED when it came
        with another body.
        """
        request: Any = call.request
        if not _has_request_id(request):
            return await handle()
        request_id = canonical_request_id(request.request_id)
        if not request_id:
            async with self._log.unit_of_work():
                return await handle()
        key = (str(current_principal()), call.method, request_id)
        async with self._keyed.lock(key), self._log.unit_of_work():
            found = await self._log.find(*key)
            if found is not None:
                return _replayed(found, request, request_id)
            # Taken before the handler, which may fill in the message.
            printed = fingerprint(request)
            response = await handle()
            await self._log.remember(*key, printed, response.SerializeToString())
            return response
        raise AssertionError("a unit of work does not swallow exceptions")


def _has_request_id(request: object) -> bool:
    return isinstance(request, Message) and "request_id" in request.DESCRIPTOR.fields_by_name


def canonical_request_id(text: str) -> str:
    """Return a request id in the usual spelling, "" for none. Raises InvalidArgument when it is no UUID."""
    if not text:
        return ""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or text.lower() != str(parsed):
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="request_id",
                description=f"must be a UUID such as {uuid.UUID(int=0)}, or empty, got {text!r}",
            )
        )
    return str(parsed)


class KeyedLocks:
    """A lock for each key that somebody holds or waits for, and none for any other."""

    def __init__(self) -> None:
        self._held: dict[Any, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def lock(self, key: Any) -> AsyncIterator[None]:
        """Hold the key's lock for the length of a block."""
        lock, users = self._held.get(key, (asyncio.Lock(), 0))
        self._held[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._held[key]
            if users == 1:
                del self._held[key]
            else:
                self._held[key] = (lock, users - 1)

    def __len__(self) -> int:
        return len(self._held)


def _replayed(found: tuple[str, bytes], request: Message, request_id: str) -> bytes:
    stored, response_bytes = found
    if not _is_of(stored, request):
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="request_id",
                description=f"{request_id} was used with another body; a new call takes a new UUID",
                reason=Reason.REQUEST_ID_REUSED,
            )
        )
    return response_bytes
