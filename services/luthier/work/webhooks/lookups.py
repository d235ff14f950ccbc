"""Names looked up in threads, none of which another name, or the end of the process, waits for."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress


class Lookups:
    """Looks names up, each at most once at a time: whoever asks meanwhile gets the same answer.

    A lookup cannot be ended, and a dead zone holds its thread for minutes. So there are as many threads as names that
    are being looked up: ask only for names of a list that ends. For one event loop.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def addresses(self, host: str) -> Sequence[str]:
        """Return the addresses of a name, in the system's order. Raises OSError when it is not known."""
        running = self._running.get(host)
        if running is None:
            running = asyncio.get_running_loop().create_future()
            self._running[host] = running
            running.add_done_callback(lambda done: self._ended(host, done))
            # A pool's threads are waited for when Python ends.
            threading.Thread(
                target=_look_up, args=(host, running), name="webhook-lookup", daemon=True
            ).start()
        return await asyncio.shield(running)

    def _ended(self, host: str, running: asyncio.Future[Sequence[str]]) -> None:
        del self._running[host]
        # Whoever asked may have gone: then nobody else takes what went wrong.
        if not running.cancelled():
            running.exception()


def _look_up(host: str, asked: asyncio.Future[Sequence[str]]) -> None:
    found: Sequence[str] | Exception
    try:
        found = [str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except UnicodeError:  # a label that no name can have
        found = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    except Exception as error:  # whoever asked is told
        found = error
    with suppress(RuntimeError):  # the loop is closed
        asked.get_loop().call_soon_threadsafe(_answer, asked, found)


def _answer(asked: asyncio.Future[Sequence[str]], found: Sequence[str] | Exception) -> None:
    if asked.done():
        return
    if isinstance(found, Exception):
        asked.set_exception(found)
    else:
        asked.set_result(found)
