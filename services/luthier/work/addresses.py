"""Addresses outside of Luthier that operators allow to be called: reward services, and language models that judge."""

from __future__ import annotations

import re
from collections.abc import Iterable

from luthier.errors import FieldViolation, InvalidArgument, Reason

_ENTRY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?")


class AllowedAddresses:
    """The addresses that may be called: `host` is any port of it, `host:port` that port alone.

    Args:
        entries: these addresses.
        setting: where the operator says them.

    Raises InvalidArgument for an entry that is neither.
    """

    def __init__(self, entries: Iterable[str], setting: str = "LUTHIER_REWARD_ADDRESSES") -> None:
        self._entries = tuple(entries)
        self._setting = setting
        self._allowed: set[tuple[str, int | None]] = set()
        for entry in self._entries:
            found = parts_of(entry)
            if found is None:
                raise InvalidArgument(
                    f"{setting} must hold host or host:port, e.g. 127.0.0.1:50051, got {entry!r}"
                )
            self._allowed.add(found)

    def allows(self, address: str) -> bool:
        """Whether an address, host:port, may be called."""
        found = parts_of(address)
        if found is None or found[1] is None:
            return False
        return found in self._allowed or (found[0], None) in self._allowed

    def require(self, address: str, field: str, shown: str = "") -> None:
        """Raise InvalidArgument ADDRESS_NOT_ALLOWED, naming the field, unless an address may be called.

        `shown` is what the field holds where that is more than the address.
        """
        if self.allows(address):
            return
        description = (
            f"must be host:port of {', '.join(self._entries) or 'nobody'}, which {self._setting} allows, "
            f"got {(shown or address)!r}"
        )
        raise InvalidArgument.of_fields(
            FieldViolation(field=field, description=description, reason=Reason.ADDRESS_NOT_ALLOWED)
        )


def parts_of(address: str) -> tuple[str, int | None] | None:
    """Return host, in small letters, and port of `host` or `host:port`; None for anything else."""
    found = _ENTRY.fullmatch(address)
    if found is None:
        return None
    if found["port"] is None:
        return found["host"].lower(), None
    port = int(found["port"])
    return (found["host"].lower(), port) if 0 < port < 65536 else None
