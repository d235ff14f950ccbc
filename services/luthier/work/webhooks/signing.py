"""Secrets of receivers, and signatures by them: HMAC-SHA256 as Standard Webhooks 1.0 has it, `v1`."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.errors import FailedPrecondition
from luthier.runtime.keys import read_key

SECRET_FILE = "webhook-secret"
"""In the home. Each line is a secret that those of receivers are made from: while there are two, both sign."""
SECRET_KIND = "lh"
_MOST_SECRETS = 4
_LEAST_CHARACTERS = 24
_PREFIX = "whsec_"
_PURPOSE = b"luthier webhook "


def secrets_of(path: Path, origin: str, project: str) -> Sequence[str]:
    """Return a project's secrets of the receiver at an origin, newest first, as receivers take them: `whsec_...`.

    Each origin has its own, so that a receiver cannot sign what another one believes; and each project there, so that
    whoever has a project's cannot sign for the others.

    Raises:
        NotFound: there is no such file.
        FailedPrecondition: others than its owner may read it, it is no text, or it holds no secret, too many or one
            that is guessed too easily.
    """
    try:
        lines = [line.strip() for line in read_key(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FailedPrecondition(f"{path} cannot be read: {why}") from error
    if len(lines) > _MOST_SECRETS:
        raise FailedPrecondition(
            f"{path} must hold at most {_MOST_SECRETS} secrets, one a line, got {len(lines)}"
        )
    for number, line in enumerate(lines, start=1):
        if len(line) < _LEAST_CHARACTERS:
            raise FailedPrecondition(
                f"{path} must hold secrets of at least {_LEAST_CHARACTERS} random characters, got {len(line)} "
                f"in secret {number}"
            )
    # No origin and no project has a space in it.
    purpose = _PURPOSE + f"{origin} {project}".encode()
    made = [hmac.digest(line.encode(), purpose, hashlib.sha256) for line in lines]
    return [_PREFIX + base64.b64encode(one).decode() for one in made]


def signed_headers(
    secrets: Sequence[str], delivery_id: str, timestamp: int, body: bytes
) -> Mapping[str, str]:
    """Return the headers that say which delivery this is, when it is sent (Unix seconds), and that it is ours."""
    content = f"{delivery_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(_signature(secret, content) for secret in secrets),
    }


def _signature(secret: str, content: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
