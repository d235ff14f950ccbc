"""Which addresses of users a service, or a worker, may call: those that the operator lists."""

from __future__ import annotations

import re
from collections.abc import Iterable

from luthier.errors import InvalidArgument

HOST = r"\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}"
"""A name, or an address; one of IPv6 in brackets."""
_ENTRY = re.compile(rf"(?P<host>{HOST})(?::(?P<port>[0-9]{{1,5}}))?")


class AllowedAddresses:
    """The addresses that may be called: `host` is any port of it, `host:port` that port alone.

    Raises InvalidArgument, naming the setting, for an entry that is neither.
    """

    def __init__(self, setting: str, entries: Iterable[str]) -> None:
        self._setting = setting
        self._entries = tuple(entries)
        self._allowed: set[tuple[str, int | None]] = set()
        for entry in self._entries:
            found = split(entry)
            if found is None:
                raise InvalidArgument(
                    f"{setting} must hold host or host:port, e.g. 127.0.0.1:50051, got {entry!r}"
                )
            self._allowed.add(found)

    def allows(self, host: str, port: int) -> bool:
        """Tell whether a port of a host may be called; an address of IPv6 stands in brackets."""
        return bool(self._allowed & {(host.lower(), None), (host.lower(), port)})

    def said(self) -> str:
        """Return in words what may be called, and which setting says so."""
        return f"host:port of {', '.join(self._entries) or 'nobody'}, which {self._setting} allows"


def split(address: str) -> tuple[str, int | None] | None:
    """Return the host of `host` or `host:port` in lower case, and the port where there is one; None: it is neither."""
    found = _ENTRY.fullmatch(address)
    if found is None:
        return None
    port = None if found["port"] is None else int(found["port"])
    if port is not None and not 0 < port < 65536:
        return None
    return found["host"].lower(), port
