"""What a service reads of webhooks from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.errors import InvalidArgument

_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookConfig:
    """Settings of all services that send, section WEBHOOKS.

    Raises:
        InvalidArgument: a time is none that can be waited for.
    """

    addresses: tuple[str, ...] = ()
    """Where webhooks may go: `host` is any port of it, `host:port` that port alone. Empty: nowhere."""
    networks: tuple[str, ...] = ()
    """Networks that are not of the internet and that those hosts may be in all the same, 10.1.0.0/16 say."""
    ca_file: Path | None = None
    """Certificates (PEM) that receivers' own are signed by, beside those that the system trusts."""
    timeout_seconds: float = 15.0
    """What an attempt may take, from finding the address to the answer."""
    first_delay_seconds: float = 5.0
    """Between the first attempt and the second; each further pause is three times as long, at most an hour."""
    max_age_seconds: float = 3 * _DAY
    """After the end of its resource a delivery is given up."""

    def __post_init__(self) -> None:
        for name, most in (
            ("timeout_seconds", 300.0),
            ("first_delay_seconds", 3600.0),
            ("max_age_seconds", 30 * _DAY),
        ):
            value: float = getattr(self, name)
            if not 0 < value <= most:
                raise InvalidArgument(
                    f"LUTHIER_WEBHOOKS_{name.upper()} must be above 0 and at most {most:g}, got {value:g}"
                )
