"""List pages as AIP-158 has them: bounded sizes, and tokens that only this service can make."""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

_MAC_BYTES = 16


def page_size(requested: int, *, default: int = DEFAULT_PAGE_SIZE, maximum: int = MAX_PAGE_SIZE) -> int:
    """Return how many to put on a page: 0 means the default, more than the maximum means the maximum.

    Raises InvalidArgument for a negative size.
    """
    if requested < 0:
        raise InvalidArgument.of_fields(
            FieldViolation(field="page_size", description=f"must not be negative, got {requested}")
        )
    return min(requested, maximum) if requested else default


def fingerprint(method: str, *arguments: str) -> str:
    """Return what binds a token to a call: the method and all arguments but page_size and page_token."""
    return hashlib.sha256(json.dumps([method, *arguments]).encode()).hexdigest()[:32]


class PageTokens:
    """Makes and reads page tokens: signed, so nobody can make one, and bound to the call's other arguments.

    A token holds a place in an order and grants nothing: a call with one is authorised like any other.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) >= 16, "a signing key has at least 128 bits"
        self._key = key

    def encode(self, cursor: Sequence[str], fingerprint: str) -> str:
        """Return the token of the page that starts after a cursor."""
        payload = json.dumps([*cursor], separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._mac(payload, fingerprint) + payload).decode().rstrip("=")

    def decode(self, token: str, fingerprint: str) -> tuple[str, ...] | None:
        """Return the cursor that a token holds; None for the empty token, which starts at the first page.

        Raises InvalidArgument PAGE_TOKEN_INVALID for a token of another service, call or set of arguments.
        """
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise _invalid() from None
        mac, payload = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(payload, fingerprint)):
            raise _invalid()
        return tuple(json.loads(payload))

    def _mac(self, payload: bytes, fingerprint: str) -> bytes:
        message = b"page-token\0" + fingerprint.encode() + b"\0" + payload
        return hmac.digest(self._key, message, "sha256")[:_MAC_BYTES]


def _invalid() -> InvalidArgument:
    return InvalidArgument.of_fields(
        FieldViolation(
            field="page_token",
            description="must be the next_page_token of a call with the same other fields; start again without",
            reason=Reason.PAGE_TOKEN_INVALID,
        )
    )
