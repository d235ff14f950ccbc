"""What webhooks of a resource may be by number and length; where they may lead is looked at beside."""

from __future__ import annotations

from luthier.runtime.field_limits import LimitTable, count, demanded, num_bytes

MAX_WEBHOOKS = 8
MAX_URL_BYTES = 2048
LIMITS: LimitTable = {
    "webhooks": count(MAX_WEBHOOKS, "webhooks"),
    "webhooks[].url": demanded(num_bytes(MAX_URL_BYTES)),
}
"""Of a resource that tells webhooks of its end."""
