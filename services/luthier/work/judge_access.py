"""What judges outside of Luthier may be asked, and with which keys: said by the operator, read by the worker alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.runtime.config import take
from luthier.v1.judge_pb2 import JudgeEndpoint
from luthier.work.addresses import AllowedAddresses, split

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_MAX_KEY_BYTES = 16384


class Settings(Protocol):
    """The settings that this reads."""

    @property
    def judge_addresses(self) -> tuple[str, ...]:
        """Hosts that may be asked."""
        ...

    @property
    def judge_keys(self) -> tuple[str, ...]:
        """Keys, and where they may go."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a judge is asked: `host` in brackets where it is an IPv6 address, `path` without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def address(self) -> str:
        """Return host:port."""
        return f"{self.host}:{self.port}"


def target_of(url: str) -> Target:
    """Read the URL of an endpoint.

    Raises:
        ValueError: it is none, with what would be right.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc
    is_plain = url.isascii() and url.isprintable() and " " not in url and not {"?", "#", "@"} & set(url)
    if not is_plain or parts.scheme not in _PORTS or split(host) is None or port == 0:
        raise ValueError(
            "must be http:// or https:// with host, port and path alone, e.g. https://api.openai.com/v1, got "
            f"{url[:200]!r}"
        )
    return Target(
        scheme=parts.scheme, host=host.lower(), port=port or _PORTS[parts.scheme], path=parts.path.rstrip("/")
    )


class JudgeAccess:
    """Which endpoints may be asked, and which keys they may be sent.

    Args:
        addresses: `host` or `host:port`.
        keys: `KEY@host` or `KEY@host:port`, where KEY is a variable's name or the absolute path of a file: the key goes
            nowhere else.
        values: what these variables hold; None in a process that only checks.

    Raises InvalidArgument for an entry that is neither.
    """

    def __init__(
        self, addresses: Iterable[str], keys: Iterable[str], values: Mapping[str, str] | None = None
    ) -> None:
        self._addresses = AllowedAddresses("LUTHIER_JUDGE_ADDRESSES", addresses)
        self._values = {} if values is None else dict(values)
        hosts: dict[str, list[str]] = {}
        for entry in keys:
            key, _, address = entry.rpartition("@")
            if not _is_key(key) or split(address) is None:
                raise InvalidArgument(
                    "LUTHIER_JUDGE_KEYS must hold VARIABLE@host:port or /path/of/file@host:port, e.g. "
                    f"OPENAI_API_KEY@api.openai.com:443, got {entry!r}"
                )
            hosts.setdefault(key, []).append(address)
        self._hosts = {key: AllowedAddresses("LUTHIER_JUDGE_KEYS", found) for key, found in hosts.items()}

    @classmethod
    def of(cls, settings: Settings) -> JudgeAccess:
        """Return what the settings of a service allow, which never reads a key."""
        return cls(settings.judge_addresses, settings.judge_keys)

    @classmethod
    def of_worker(cls, settings: Settings) -> JudgeAccess:
        """Return what the settings of a worker allow, whose variables with keys no process that it starts sees."""
        names = [entry.rpartition("@")[0] for entry in settings.judge_keys]
        return cls(settings.judge_addresses, settings.judge_keys, take(names))

    def require(self, endpoint: JudgeEndpoint, field: str) -> Target:
        """Return where an endpoint is asked.

        Raises InvalidArgument, naming the field: it is no URL, ADDRESS_NOT_ALLOWED, KEY_NOT_ALLOWED.
        """
        try:
            target = target_of(endpoint.url)
        except ValueError as error:
            raise InvalidArgument.of_fields(
                FieldViolation(field=f"{field}.url", description=str(error))
            ) from error
        if not self._addresses.allows(target.host, target.port):
            description = f"must be {self._addresses.said()}, got {endpoint.url!r}"
            raise _refused(f"{field}.url", description, Reason.ADDRESS_NOT_ALLOWED)
        if endpoint.key:
            self._require_key(endpoint, target, field)
        return target

    def key(self, endpoint: JudgeEndpoint) -> str:
        """Read the key of an endpoint that is allowed; empty where it names none.

        Raises FailedPrecondition KEY_UNREADABLE, which never shows what was read.
        """
        name = endpoint.key
        if not name:
            return ""
        try:
            text = _read(Path(name)) if name.startswith("/") else self._values[name]
        except KeyError:
            raise _unreadable(name, "the variable is not set") from None
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) and error.strerror else "it is no text"
            raise _unreadable(name, words) from None
        text = text.strip()
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise _unreadable(name, "it must hold one word of ASCII letters, digits and signs")
        return text

    def _require_key(self, endpoint: JudgeEndpoint, target: Target, field: str) -> None:
        allowed = sorted(key for key, hosts in self._hosts.items() if hosts.allows(target.host, target.port))
        if endpoint.key not in allowed:
            description = (
                f"must be one of the keys that LUTHIER_JUDGE_KEYS lets go to {target.address} "
                f"({', '.join(allowed) or 'none'}), got {endpoint.key[:200]!r}"
            )
            raise _refused(f"{field}.key", description)
        if target.scheme == "http" and target.host not in _LOOPBACK:
            description = (
                f"must be empty where the URL is not https://, as others could read it, got {endpoint.key!r}"
            )
            raise _refused(f"{field}.key", description)


def _is_key(name: str) -> bool:
    return name.startswith("/") or _VARIABLE.fullmatch(name) is not None


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_KEY_BYTES).decode()


def _refused(field: str, description: str, reason: Reason = Reason.KEY_NOT_ALLOWED) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description, reason=reason))


def _unreadable(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the worker must be able to read the key {name!r}: {why}",
        reason=Reason.KEY_UNREADABLE,
        metadata={"key": name},
    )
