"""Who can reach an address."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Tell whether a host, by name or number, is this machine alone. The empty host is every address it has."""
    bare = host.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"
