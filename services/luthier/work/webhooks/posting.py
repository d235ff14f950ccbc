"""One HTTP POST to an address that was looked at: its status is all that is read of the answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h11

from luthier.errors import InvalidArgument
from luthier.work.webhooks.targets import Target

_READ_BYTES = 16 << 10
_MAX_RETRY_AFTER = 86_400
# Of the time for all: a name may have many addresses, and a far one needs its time.
_LEAST_SHARE_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a receiver answered; `retry_after_seconds`: when it wants to be asked again at the earliest, 0: not said."""

    status: int
    retry_after_seconds: float = 0.0


class Misunderstood(Exception):
    """What answered speaks no HTTP/1.1, or ended before it answered; with words that hold nothing of it."""


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Return whose certificates are believed: the system's, and those of a file. Raises InvalidArgument."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                f"LUTHIER_WEBHOOKS_CA_FILE must name a file with certificates (PEM), got {ca_file}: {error}"
            ) from error
    return context


async def post(
    addresses: Sequence[str],
    target: Target,
    headers: Mapping[str, str],
    body: bytes,
    *,
    trusted: ssl.SSLContext,
    deadline: float,
) -> Answer:
    """Send a body to the first of the addresses that takes a connection, and return what is answered.

    No name is looked up, no redirect is followed, no proxy is asked, and nothing but the head of the answer is read.
    The caller ends all of it at the deadline, in the loop's time; no address takes what the others need until then.

    Raises:
        OSError: nobody takes a connection (also ssl.SSLError: its certificate is not believed).
        Misunderstood: the answer is none.
    """
    reader, writer = await _connected(addresses, target, trusted, deadline)
    try:
        http = h11.Connection(our_role=h11.CLIENT)
        request = h11.Request(
            method="POST",
            target=target.path,
            headers=[
                ("host", target.authority),
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("user-agent", "luthier"),
                ("connection", "close"),
                *headers.items(),
            ],
        )
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(http.send(event) or b"")
        await writer.drain()
        return await _answer(http, reader)
    finally:
        # At once: a polite end of TLS would wait for the receiver.
        writer.transport.abort()


async def _connected(
    addresses: Sequence[str], target: Target, trusted: ssl.SSLContext, deadline: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    failure: OSError = OSError("it has no address")
    security = trusted if target.is_secure else None
    host = target.host.strip("[]") if target.is_secure else None
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        now = asyncio.get_running_loop().time()
        share = max((deadline - now) / left, _LEAST_SHARE_SECONDS)
        try:
            async with asyncio.timeout_at(now + share if left > 1 else None):
                return await asyncio.open_connection(address, target.port, ssl=security, server_hostname=host)
        except OSError as error:  # TimeoutError is one
            failure = error
    raise failure


async def _answer(http: h11.Connection, reader: asyncio.StreamReader) -> Answer:
    event = await _next_event(http, reader)
    while isinstance(event, h11.InformationalResponse):
        event = await _next_event(http, reader)
    assert isinstance(event, h11.Response), event
    return Answer(status=event.status_code, retry_after_seconds=_retry_after(event))


async def _next_event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            data = await reader.read(_READ_BYTES)
            if not data and not http.trailing_data[0]:
                raise Misunderstood("it ended the connection before it answered")
            http.receive_data(data)
    except h11.RemoteProtocolError as error:
        raise Misunderstood("what it answered is no HTTP/1.1") from error
    return event


def _retry_after(response: h11.Response) -> float:
    """Return the seconds of the header Retry-After; a date in it is not looked at."""
    found = [value for name, value in response.headers if name == b"retry-after"]
    said = found[0].decode("ascii", "replace") if found else ""
    return float(min(int(said), _MAX_RETRY_AFTER)) if said.isdecimal() and len(said) < 10 else 0.0
