"""Who calls, and what they may call: API keys, the worker key, task tokens, and one policy for every method."""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from luthier.errors import PermissionDenied, Reason, Unauthenticated
from luthier.runtime.keys import Keys

Kind = Literal["key", "worker", "task"]

Policy = Mapping[str, frozenset[Kind]]
"""Which kinds of principal may call a method, by its full name (`/luthier.v1.DataService/GetDataset`)."""

_TOKEN_PREFIX = "lt_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who calls. `project` None means every project; a task may only touch `resources` and what lies below."""

    kind: Kind
    subject: str
    project: str | None = None
    resources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{self.subject}"


_principal: ContextVar[Principal | None] = ContextVar("luthier_principal", default=None)


def current_principal() -> Principal | None:
    """Return who makes the call that is being handled; None outside of a call and in a health check."""
    return _principal.get()


def set_principal(principal: Principal | None) -> None:
    """Set who makes the current call. For the server's own use."""
    _principal.set(principal)


class TaskTokens:
    """Makes and checks the tokens that let a task's worker, or a service on a task's behalf, read at another service.

    A token is signed, names its project and resources, and ends by the wall clock. It needs no database: services
    that share the secret trust one another's.
    """

    def __init__(self, secret: str | bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode() if isinstance(secret, str) else secret
        assert len(self._secret) >= 16, "a signing secret has at least 128 bits"
        self._clock = clock

    def mint(
        self, project: str, resources: Iterable[str], epoch: int, task: str, lifetime_seconds: float
    ) -> str:
        """Return a token for a task in one of its epochs that may read `resources` for a while."""
        claims = {
            "project": project,
            "resources": list(resources),
            "epoch": epoch,
            "task": task,
            "expires": self._clock() + lifetime_seconds,
        }
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        return f"{_TOKEN_PREFIX}{payload}.{self._mac(payload)}"

    def verify(self, token: str) -> Principal:
        """Return whose token it is. Raises Unauthenticated CREDENTIALS_INVALID, without a word of the token."""
        payload, _, mac = token.removeprefix(_TOKEN_PREFIX).partition(".")
        if not token.startswith(_TOKEN_PREFIX) or not hmac.compare_digest(
            mac.encode(), self._mac(payload).encode()
        ):
            raise Unauthenticated("the task token is not one of ours")
        try:
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (binascii.Error, ValueError) as error:
            raise AssertionError("a token with our signature has our format") from error
        if self._clock() >= claims["expires"]:
            raise Unauthenticated("the task token has expired; ask for a new one by a heartbeat")
        return Principal(
            kind="task",
            subject=f"{claims['task']}@{claims['epoch']}",
            project=claims["project"],
            resources=tuple(claims["resources"]),
        )

    def _mac(self, payload: str) -> str:
        return hmac.digest(self._secret, b"task-token\0" + payload.encode(), "sha256").hex()


class Authenticator:
    """Finds who calls from the `authorization` metadata. Keeps digests of the keys, not the keys."""

    def __init__(self, keys: Keys, task_tokens: TaskTokens | None = None) -> None:
        self._tokens = task_tokens or TaskTokens(keys.token_secret)
        kinds: tuple[tuple[Kind, str], ...] = (("key", keys.api_key), ("worker", keys.worker_key))
        self._known = tuple((_sha256(secret), kind) for kind, secret in kinds)

    def authenticate(self, authorization: str | None) -> Principal:
        """Return who calls. Raises Unauthenticated CREDENTIALS_MISSING or CREDENTIALS_INVALID."""
        if not authorization:
            raise Unauthenticated(
                "the call must carry `authorization: Bearer <key>` metadata",
                reason=Reason.CREDENTIALS_MISSING,
            )
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("`authorization` must be `Bearer <key>`")
        if secret.startswith(_TOKEN_PREFIX):
            return self._tokens.verify(secret)
        digest = _sha256(secret)
        # Every key is compared, and in constant time: the time taken tells nothing of any key.
        found = [kind for known, kind in self._known if hmac.compare_digest(digest, known)]
        if not found:
            raise Unauthenticated("the key is not known here")
        return Principal(kind=found[0], subject=digest.hex()[:12])


def permit(principal: Principal, method: str, policy: Policy) -> None:
    """Raise PermissionDenied unless this kind of principal may call the method; one without a policy nobody may."""
    if principal.kind not in policy.get(method, frozenset()):
        raise PermissionDenied(
            f"a {principal.kind} may not call {method}", metadata={"method": method, "kind": principal.kind}
        )


def confine(principal: Principal, request: Any | None) -> None:
    """Raise PermissionDenied when a task calls about what its token does not name.

    `request` is the message of a unary request, whose `name` or `parent` says what it is about; None for a stream.
    """
    if principal.kind != "task":
        return
    named = getattr(request, "name", "") or getattr(request, "parent", "")
    if not any(named == resource or named.startswith(f"{resource}/") for resource in principal.resources):
        raise PermissionDenied(
            f"the task may not touch {named or 'what its token does not name'}", metadata={"resource": named}
        )


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
