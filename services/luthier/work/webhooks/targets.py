"""Where a webhook goes: its URL taken apart, and the addresses behind it that may be called."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urlsplit

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.webhook_limits import MAX_URL_BYTES
from luthier.v1.webhook_pb2 import Webhook
from luthier.work.addresses import HOST, AllowedAddresses
from luthier.work.webhooks.lookups import Lookups

_PRINTABLE = re.compile(r"[!-~]+")
_HOST = re.compile(HOST)
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What stands for an address of IPv4 in yet another way, or is nobody's, is outside of it.
_INTERNET_V6 = ipaddress.ip_network("2000::/3")
_RIGHT = (
    f"must be https://host[:port]/path, or http:// within the operator's networks, of at most {MAX_URL_BYTES} "
    "printable ASCII characters, without a user, a password and a fragment"
)

Address = IPv4Address | IPv6Address


class NotAllowed(Exception):
    """An address, or the way to it, that the operator does not allow; with words that hold no URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A URL taken apart. What it asks for may be secret, and is never shown.

    Attributes:
        is_secure: whether it is https.
        host: in lower case; an address of IPv6 in brackets.
        port: also where the URL names none.
        path: with the query.
    """

    is_secure: bool
    host: str
    port: int
    path: str = field(repr=False)

    @property
    def origin(self) -> str:
        """Scheme, host and port: what may be shown of it, and what has a secret of its own."""
        return f"{'https' if self.is_secure else 'http'}://{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """What stands in the header Host."""
        has_own_port = self.port != _PORTS["https" if self.is_secure else "http"]
        return f"{self.host}:{self.port}" if has_own_port else self.host


def target_of(url: str) -> Target:
    """Take a URL apart. Raises ValueError with what would be right, not with the URL, which may hold a secret."""
    if len(url) > MAX_URL_BYTES or _PRINTABLE.fullmatch(url) is None:
        raise ValueError(f"{_RIGHT}, got {len(url)} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"{_RIGHT}, got a host or port that is none") from None
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
    if parts.scheme not in _PORTS:
        raise ValueError(f"{_RIGHT}, got the scheme {parts.scheme[:20]!r}")
    if "@" in parts.netloc or "#" in url or port == 0 or _HOST.fullmatch(host) is None or "\\" in url:
        raise ValueError(f"{_RIGHT}, got one with another part, or without a host")
    query = f"?{parts.query}" if parts.query else ""
    return Target(
        is_secure=parts.scheme == "https",
        host=host.lower(),
        port=port or _PORTS[parts.scheme],
        path=(parts.path or "/") + query,
    )


class Targets:
    """Which webhooks may be called, and at which addresses.

    Args:
        addresses: `host` or `host:port`, as `LUTHIER_WEBHOOKS_ADDRESSES` has them.
        networks: those that are not of the internet and may be called, as `LUTHIER_WEBHOOKS_NETWORKS` has them.

    Raises:
        InvalidArgument: an entry is no address or no network.
    """

    def __init__(self, addresses: Sequence[str], networks: Iterable[str] = ()) -> None:
        self._allowed = AllowedAddresses("LUTHIER_WEBHOOKS_ADDRESSES", addresses)
        self._networks = [_network(one) for one in networks]
        self._lookups = Lookups()

    def require(self, webhooks: Sequence[Webhook], field: str) -> None:
        """Raise InvalidArgument that names each webhook of a field that is none, or may not be called.

        Names are not looked up: what they lead to is looked at before every call.
        """
        violations = [
            violation
            for index, webhook in enumerate(webhooks)
            for violation in self._violations(webhook.url, f"{field}[{index}].url")
        ]
        if violations:
            raise InvalidArgument.of_fields(*violations)

    def _violations(self, url: str, field: str) -> Iterable[FieldViolation]:
        try:
            target = target_of(url)
        except ValueError as error:
            yield FieldViolation(field=field, description=str(error))
            return
        if not self._allowed.allows(target.host, target.port):
            yield FieldViolation(
                field=field,
                description=f"must lead to {self._allowed.said()}, got {target.origin}",
                reason=Reason.ADDRESS_NOT_ALLOWED,
            )

    async def addresses(self, target: Target) -> Sequence[str]:
        """Return the addresses that a webhook leads to now and that may be called, in the system's order.

        Whoever calls connects to one of them, and looks up nothing again.

        Raises:
            NotAllowed: the operator does not allow the host any more, or none of its addresses.
            OSError: its name is not known.
        """
        if not self._allowed.allows(target.host, target.port):
            raise NotAllowed(f"{target.origin} is not {self._allowed.said()}")
        resolved = list(dict.fromkeys(await self._lookups.addresses(target.host.strip("[]"))))
        usable = [one for one in resolved if self._may_call(ipaddress.ip_address(one), target)]
        if not usable:
            need = "" if target.is_secure else ", and http goes to no others"
            # Which ones is nothing for whoever wrote the URL.
            raise NotAllowed(
                f"{target.origin} leads to no address that may be called: those that are not of the internet must be "
                f"in LUTHIER_WEBHOOKS_NETWORKS{need}"
            )
        return usable

    def _may_call(self, address: Address, target: Target) -> bool:
        """Tell whether an address is one of the internet, over https, or one that the operator named himself."""
        meant = _meant(address)
        if any(meant in network for network in self._networks) or _is_named(meant, target.host):
            return True
        return target.is_secure and _is_of_internet(meant)


def _is_of_internet(address: Address) -> bool:
    # What Python calls global is all that no registry has set aside, fec0:: among it.
    if isinstance(address, IPv6Address) and address not in _INTERNET_V6:
        return False
    return address.is_global and not address.is_multicast


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidArgument(
            f"LUTHIER_WEBHOOKS_NETWORKS must hold networks, e.g. 10.1.0.0/16, got {text!r}: {error}"
        ) from error


def _meant(address: Address) -> Address:
    """Return the address of IPv4 that one of IPv6 stands for, where it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_named(address: Address, host: str) -> bool:
    """Tell whether an allowed host is this very address: a name leads where its owner wants, except `localhost`."""
    if host == "localhost":
        return address.is_loopback
    try:
        return _meant(ipaddress.ip_address(host.strip("[]"))) == address
    except ValueError:
        return False
